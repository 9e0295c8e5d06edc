// Reads commands on standard input and answers them, for both of the Go programs.
package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

const (
	poolSize     = 20
	queries      = 40
	againSeconds = 20
	sleeping     = "select count(*) from pg_stat_activity where pid = $1 and wait_event = 'PgSleep'"
)

// A command gets the word after its name and returns the lines of its answer.
type command func(argument string) (string, error)

// What a driver cannot do by its nature; the text says why.
type cannot string

func (reason cannot) Error() string { return string(reason) }

var values = [][2]string{
	{"bool", "t"},
	{"int2", "-32768"},
	{"int4", "2147483647"},
	{"int8", "-9223372036854775808"},
	{"float4", "1.5"},
	{"float8", "1e-300"},
	{"numeric", "12345678901234567890.123456789"},
	{"text", "it's a \"quote\"\nanother line, ünïcödé ✓"},
	{"varchar", ""},
	{"bytea", "\\x00ff10"},
	{"date", "2024-02-29"},
	{"timestamptz", "2024-02-29 12:00:00.123456+00"},
	{"interval", "3 days 00:00:05.000007"},
	{"uuid", "5ca1ab1e-0000-4000-8000-00000000c0de"},
	{"json", `{"a": [1, null]}`},
	{"jsonb", `{"b": "ü"}`},
	{"int4[]", "{1,2,3}"},
	{"text[]", `{a,NULL,""}`},
}

func main() {
	programs := map[string]map[string]command{"pgx": pgxCommands, "pq": pqCommands}
	commands := programs[os.Args[1]]
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		name, argument, _ := strings.Cut(lines.Text(), " ")
		answer, err := commands[name](argument)
		var reason cannot
		if errors.As(err, &reason) {
			answer = "cannot: " + string(reason)
		} else if err != nil {
			answer = strings.ReplaceAll(fmt.Sprintf("error: %s %v", sqlstate(err), err), "\n", " ")
		}
		fmt.Printf("%s\n.\n", answer)
	}
}

// Both drivers' errors say their SQLSTATE by this.
func sqlstate(err error) string {
	var found interface{ SQLState() string }
	if errors.As(err, &found) {
		return found.SQLState()
	}
	return "none"
}

// packaged returns a driver's version: as a source without its module it does not say it itself.
func packaged(driver, name string) (string, error) {
	name = "golang-github-" + name + "-dev"
	version, err := exec.Command("dpkg-query", "--show", "--showformat=${Version}", name).Output()
	return driver + " " + string(version), err
}

func checksum(text string) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(text)))[:16]
}

// atOnce returns how many backends twenty goroutines have at once. `take` takes a connection and
// returns its backend and what gives it back.
func atOnce(take func() (int, func(), error)) (int, error) {
	var taken, done sync.WaitGroup
	var lock sync.Mutex
	var failed error
	backends := map[int]bool{}
	taken.Add(poolSize)
	done.Add(poolSize)
	for n := 0; n < poolSize; n++ {
		go func() {
			defer done.Done()
			backend, giveBack, err := take()
			lock.Lock()
			if err == nil {
				backends[backend] = true
			} else {
				failed = err
			}
			lock.Unlock()
			taken.Done()
			taken.Wait()
			if err == nil {
				giveBack()
			}
		}()
	}
	done.Wait()
	return len(backends), failed
}

// again returns how many of forty queries were answered; then twenty connections are open again.
func again(query func(int) (int, error), take func() (int, func(), error)) (string, error) {
	answers := make(chan error, queries)
	turns := make(chan bool, poolSize)
	for n := 0; n < queries; n++ {
		turns <- true
		go func(n int) {
			answers <- triedAgain(func() error {
				answer, err := query(n)
				if err == nil && answer != n {
					err = fmt.Errorf("%d was answered with %d", n, answer)
				}
				return err
			})
			<-turns
		}(n)
	}
	for n := 0; n < queries; n++ {
		if err := <-answers; err != nil {
			return "", err
		}
	}
	err := triedAgain(func() error {
		opened, err := atOnce(take)
		if err == nil && opened != poolSize {
			err = fmt.Errorf("%d connections are open", opened)
		}
		return err
	})
	return fmt.Sprint(queries), err
}

// triedAgain tries for a while: what a pool does not test may fail.
func triedAgain(do func() error) error {
	deadline := time.Now().Add(againSeconds * time.Second)
	for {
		err := do()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// cancelled cancels a query as soon as it sleeps. Without it the query ends by itself.
func cancelled(cancel func(), sleeps func() (int, error)) {
	for deadline := time.Now().Add(againSeconds * time.Second); time.Now().Before(deadline); {
		if count, err := sleeps(); err == nil && count > 0 {
			cancel()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}
