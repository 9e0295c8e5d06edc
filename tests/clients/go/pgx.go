// pgx with its own pool, pgxpool.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgconn"
	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
)

// More than pgx keeps prepared, which is 512.
const pgxStatements = 600

var (
	pgxPool     *pgxpool.Pool
	background  = context.Background()
	pgxCommands = map[string]command{
		"version":        func(string) (string, error) { return packaged("pgx and pgxpool", "jackc-pgx-v4") },
		"connect":        pgxConnect,
		"key_in_name":    func(database string) (string, error) { return pgxShard("dbname=" + database) },
		"key_in_options": func(option string) (string, error) { return pgxShard("options='-c " + option + "'") },
		"types":          pgxTypes,
		"prepared":       pgxPrepared,
		"cursor":         pgxCursor,
		"copy":           pgxCopy,
		"rollback":       pgxRollback,
		"cancel":         pgxCancel,
		"pool":           pgxOpenPool,
		"again":          func(string) (string, error) { return again(pgxQuery, pgxTake) },
		"refused":        pgxRefused,
		"close":          pgxClose,
	}
)

func pgxOn(settings string, do func(*pgx.Conn) (string, error)) (string, error) {
	connection, err := pgx.Connect(background, settings)
	if err != nil {
		return "", err
	}
	defer connection.Close(background)
	return do(connection)
}

func pgxConnect(string) (string, error) {
	return pgxOn("", func(connection *pgx.Conn) (string, error) {
		var database string
		var one int
		err := connection.QueryRow(background, "select current_database(), 1").Scan(&database, &one)
		return fmt.Sprint(database, " ", one), err
	})
}

func pgxShard(settings string) (string, error) {
	return pgxOn(settings, func(connection *pgx.Conn) (name string, err error) {
		err = connection.QueryRow(background, "select name from shard_identity").Scan(&name)
		return name, err
	})
}

// pgx writes and reads each type in either format: what it reads in binary it sends in binary.
func pgxTypes(string) (string, error) {
	return pgxOn("", func(connection *pgx.Conn) (string, error) {
		var lines []string
		for _, format := range []int16{pgx.TextFormatCode, pgx.BinaryFormatCode} {
			for _, value := range values {
				var read, null interface{}
				literal := strings.ReplaceAll(value[1], "'", "''")
				sql := fmt.Sprintf("select '%s'::%s, null::%[2]s", literal, value[0])
				row := connection.QueryRow(background, sql, pgx.QueryResultFormats{format})
				if err := row.Scan(&read, &null); err != nil {
					return "", err
				}
				var back string
				sql = fmt.Sprintf("select $1::%s::text", value[0])
				if err := connection.QueryRow(background, sql, read).Scan(&back); err != nil {
					return "", err
				}
				lines = append(lines, fmt.Sprintf("%s, format %d: %q %v", value[0], format, back, null))
			}
		}
		return strings.Join(lines, "\n"), nil
	})
}

func pgxPrepared(string) (string, error) {
	return pgxOn("", func(connection *pgx.Conn) (string, error) {
		count, sum := 0, 0
		for count < 2*pgxStatements {
			var answer int
			sql := fmt.Sprintf("select %d + $1::int", count%pgxStatements)
			if err := connection.QueryRow(background, sql, 1).Scan(&answer); err != nil {
				return "", err
			}
			count, sum = count+1, sum+answer
		}
		return fmt.Sprint(count, " ", sum), nil
	})
}

// Rows come as the server sends them; pgx reads no more of them than are asked for.
func pgxCursor(string) (string, error) {
	return pgxOn("", func(connection *pgx.Conn) (string, error) {
		rows, err := connection.Query(background, "select n from generate_series(1, 100000) n")
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

func pgxCopy(string) (string, error) {
	return pgxOn("", func(connection *pgx.Conn) (string, error) {
		if _, err := connection.Exec(background, "create temp table copied (n int, s text)"); err != nil {
			return "", err
		}
		rows := pgx.CopyFromSlice(10000, func(n int) ([]interface{}, error) {
			return []interface{}{n, fmt.Sprintf("row\t%d", n)}, nil
		})
		copied, err := connection.CopyFrom(background, pgx.Identifier{"copied"}, []string{"n", "s"}, rows)
		if err != nil {
			return "", err
		}
		var out bytes.Buffer
		_, err = connection.PgConn().CopyTo(background, &out, "copy copied to stdout")
		return fmt.Sprint(copied, " ", checksum(out.String())), err
	})
}

func pgxRollback(string) (string, error) {
	return pgxOn("", func(connection *pgx.Conn) (string, error) {
		if _, err := connection.Exec(background, "create temp table kept (n int primary key)"); err != nil {
			return "", err
		}
		failed := connection.BeginFunc(background, func(transaction pgx.Tx) (err error) {
			for n := 0; n < 2 && err == nil; n++ {
				_, err = transaction.Exec(background, "insert into kept values (1)")
			}
			return err
		})
		var count int
		err := connection.QueryRow(background, "select count(*) from kept").Scan(&count)
		return fmt.Sprint(sqlstate(failed), " ", count), err
	})
}

// A context that ends closes the connection of pgx; CancelRequest keeps it.
func pgxCancel(string) (string, error) {
	return pgxOn("", func(connection *pgx.Conn) (string, error) {
		return pgxOn("", func(other *pgx.Conn) (string, error) {
			var pid, one int
			if err := connection.QueryRow(background, "select pg_backend_pid()").Scan(&pid); err != nil {
				return "", err
			}
			go cancelled(
				func() { connection.PgConn().CancelRequest(background) },
				func() (count int, err error) {
					err = other.QueryRow(background, sleeping, pid).Scan(&count)
					return count, err
				},
			)
			_, failed := connection.Exec(background, "select pg_sleep(60)")
			err := connection.QueryRow(background, "select 1").Scan(&one)
			return fmt.Sprint(sqlstate(failed), " ", one), err
		})
	})
}

func pgxOpenPool(string) (string, error) {
	config, err := pgxpool.ParseConfig("")
	if err != nil {
		return "", err
	}
	config.MaxConns, config.MaxConnLifetime = poolSize, 45*time.Minute
	if pgxPool, err = pgxpool.ConnectConfig(background, config); err != nil {
		return "", err
	}
	opened, err := atOnce(pgxTake)
	return fmt.Sprint(opened), err
}

func pgxTake() (int, func(), error) {
	connection, err := pgxPool.Acquire(background)
	if err != nil {
		return 0, nil, err
	}
	var backend int
	if err = connection.QueryRow(background, "select pg_backend_pid()").Scan(&backend); err != nil {
		connection.Release()
	}
	return backend, connection.Release, err
}

func pgxQuery(n int) (answer int, err error) {
	err = pgxPool.QueryRow(background, "select $1::int", n).Scan(&answer)
	return answer, err
}

func pgxRefused(database string) (string, error) {
	connection, err := pgx.Connect(background, "dbname="+database)
	if err == nil {
		connection.Close(background)
		return "connected", nil
	}
	var refusal *pgconn.PgError
	if !errors.As(err, &refusal) {
		return "", err
	}
	return fmt.Sprintf("%s %s\n%s\n%s", refusal.Code, refusal.Message, refusal.Detail, refusal.Hint), nil
}

func pgxClose(string) (string, error) {
	pgxPool.Close()
	return "closed", nil
}
