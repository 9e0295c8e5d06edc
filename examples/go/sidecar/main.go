// The same application with the sidecar: nothing in it is about tokens.
//
// With an argument it connects to the database of the tenant that has this shard key.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/jackc/pgx/v5/pgxpool"
)

func main() {
	ctx := context.Background()
	// TLS ends at the sidecar, which is on loopback. The rest comes from PGHOST and the like.
	config, err := pgxpool.ParseConfig("sslmode=disable")
	if err != nil {
		log.Fatal(err)
	}
	if len(os.Args) > 1 {
		config.ConnConfig.Database += "@" + os.Args[1]
	}
	config.MaxConns = 10
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	var user, database string
	row := pool.QueryRow(ctx, "SELECT current_user, current_database()")
	if err := row.Scan(&user, &database); err != nil {
		log.Fatal(err)
	}
	fmt.Println(user, database)
}
