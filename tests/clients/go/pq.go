// lib/pq with the pool of database/sql.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/lib/pq"
)

const pqStatements = 300

var (
	pqPool     *sql.DB
	pqCommands = map[string]command{
		"version":        func(string) (string, error) { return packaged("lib/pq, database/sql", "lib-pq") },
		"connect":        pqConnect,
		"key_in_name":    func(database string) (string, error) { return pqShard("dbname=" + database) },
		"key_in_options": func(option string) (string, error) { return pqShard("options='-c " + option + "'") },
		"types":          pqTypes,
		"prepared":       pqPrepared,
		"cursor":         pqCursor,
		"copy":           pqCopy,
		"rollback":       pqRollback,
		"cancel":         pqCancel,
		"pool":           pqOpenPool,
		"again":          func(string) (string, error) { return again(pqQuery, pqTake) },
		"refused":        pqRefused,
		"close":          func(string) (string, error) { return "closed", pqPool.Close() },
	}
)

// pqOn does something with a pool of one connection.
func pqOn(settings string, do func(*sql.DB) (string, error)) (string, error) {
	db, err := sql.Open("postgres", settings)
	if err != nil {
		return "", err
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	return do(db)
}

func pqConnect(string) (string, error) {
	return pqOn("", func(db *sql.DB) (string, error) {
		var database string
		var one int
		err := db.QueryRow("select current_database(), 1").Scan(&database, &one)
		return fmt.Sprint(database, " ", one), err
	})
}

func pqShard(settings string) (string, error) {
	return pqOn(settings, func(db *sql.DB) (name string, err error) {
		err = db.QueryRow("select name from shard_identity").Scan(&name)
		return name, err
	})
}

// lib/pq has values in text; with binary_parameters it sends bytes in binary and reads some.
func pqTypes(string) (string, error) {
	var lines []string
	for _, settings := range []string{"", "binary_parameters=yes"} {
		_, err := pqOn(settings, func(db *sql.DB) (string, error) {
			for _, value := range values {
				var sent interface{} = value[1]
				if value[0] == "bytea" {
					sent = []byte{0, 255, 16}
				}
				var read, null interface{}
				row := db.QueryRow(fmt.Sprintf("select $1::%s, $2::%[1]s", value[0]), sent, nil)
				if err := row.Scan(&read, &null); err != nil {
					return "", err
				}
				if bytes, isBytes := read.([]byte); isBytes {
					read = string(bytes)
				}
				lines = append(lines, fmt.Sprintf("%s %s %q %v", value[0], settings, fmt.Sprint(read), null))
			}
			return "", nil
		})
		if err != nil {
			return "", err
		}
	}
	return strings.Join(lines, "\n"), nil
}

// lib/pq caches nothing: a program keeps its statements.
func pqPrepared(string) (string, error) {
	return pqOn("", func(db *sql.DB) (string, error) {
		statements := make([]*sql.Stmt, pqStatements)
		for n := range statements {
			var err error
			if statements[n], err = db.Prepare(fmt.Sprintf("select %d + $1::int", n)); err != nil {
				return "", err
			}
		}
		count, sum := 0, 0
		for count < 2*pqStatements {
			var answer int
			if err := statements[count%pqStatements].QueryRow(1).Scan(&answer); err != nil {
				return "", err
			}
			count, sum = count+1, sum+answer
		}
		return fmt.Sprint(count, " ", sum), nil
	})
}

// Rows come as the server sends them; lib/pq reads no more of them than are asked for.
func pqCursor(string) (string, error) {
	return pqOn("", func(db *sql.DB) (string, error) {
		rows, err := db.Query("select n from generate_series(1, 100000) n")
		if err != nil {
			return "", err
		}
		defer rows.Close()
		count, sum := 0, 0
		for rows.Next() {
			var n int
			if err := rows.Scan(&n); err != nil {
				return "", err
			}
			count, sum = count+1, sum+n
		}
		return fmt.Sprint(count, " ", sum), rows.Err()
	})
}

// lib/pq has COPY from the client only; that is done.
func pqCopy(string) (string, error) {
	return pqOn("", func(db *sql.DB) (string, error) {
		transaction, err := db.Begin()
		if err != nil {
			return "", err
		}
		defer transaction.Rollback()
		if _, err = transaction.Exec("create temp table copied (n int, s text)"); err != nil {
			return "", err
		}
		statement, err := transaction.Prepare(pq.CopyIn("copied", "n", "s"))
		if err != nil {
			return "", err
		}
		for n := 0; n < 10000; n++ {
			if _, err = statement.Exec(n, fmt.Sprintf("row\t%d", n)); err != nil {
				return "", err
			}
		}
		if err = statement.Close(); err != nil {
			return "", err
		}
		var count int
		err = transaction.QueryRow("select count(*) from copied where s = e'row\t' || n").Scan(&count)
		if err != nil || count != 10000 {
			return "", fmt.Errorf("%d rows were copied: %v", count, err)
		}
		return "", cannot("lib/pq has no COPY out; its COPY in of 10,000 rows passed")
	})
}

func pqRollback(string) (string, error) {
	return pqOn("", func(db *sql.DB) (string, error) {
		if _, err := db.Exec("create temp table kept (n int primary key)"); err != nil {
			return "", err
		}
		transaction, err := db.Begin()
		if err != nil {
			return "", err
		}
		var failed error
		for n := 0; n < 2 && failed == nil; n++ {
			_, failed = transaction.Exec("insert into kept values (1)")
		}
		if err = transaction.Rollback(); err != nil {
			return "", err
		}
		var count int
		err = db.QueryRow("select count(*) from kept").Scan(&count)
		return fmt.Sprint(sqlstate(failed), " ", count), err
	})
}

// The context of a query is its cancel: lib/pq sends a CancelRequest when it ends.
func pqCancel(string) (string, error) {
	return pqOn("", func(db *sql.DB) (string, error) {
		return pqOn("", func(other *sql.DB) (string, error) {
			var pid, one int
			if err := db.QueryRow("select pg_backend_pid()").Scan(&pid); err != nil {
				return "", err
			}
			running, cancel := context.WithCancel(background)
			go cancelled(cancel, func() (count int, err error) {
				err = other.QueryRow(sleeping, pid).Scan(&count)
				return count, err
			})
			_, failed := db.ExecContext(running, "select pg_sleep(60)")
			err := db.QueryRow("select 1").Scan(&one)
			return fmt.Sprint(sqlstate(failed), " ", one), err
		})
	})
}

func pqOpenPool(string) (string, error) {
	var err error
	if pqPool, err = sql.Open("postgres", ""); err != nil {
		return "", err
	}
	pqPool.SetMaxOpenConns(poolSize)
	pqPool.SetMaxIdleConns(poolSize)
	pqPool.SetConnMaxLifetime(45 * time.Minute)
	opened, err := atOnce(pqTake)
	return fmt.Sprint(opened), err
}

func pqTake() (int, func(), error) {
	connection, err := pqPool.Conn(background)
	if err != nil {
		return 0, nil, err
	}
	var backend int
	if err = connection.QueryRowContext(background, "select pg_backend_pid()").Scan(&backend); err != nil {
		connection.Close()
	}
	return backend, func() { connection.Close() }, err
}

func pqQuery(n int) (answer int, err error) {
	err = pqPool.QueryRow("select $1::int", n).Scan(&answer)
	return answer, err
}

func pqRefused(database string) (string, error) {
	return pqOn("dbname="+database, func(db *sql.DB) (string, error) {
		var refusal *pq.Error
		if err := db.Ping(); !errors.As(err, &refusal) {
			return "connected", err
		}
		return fmt.Sprintf("%s %s\n%s\n%s", refusal.Code, refusal.Message, refusal.Detail, refusal.Hint), nil
	})
}
