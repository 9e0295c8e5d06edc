// An application that gets its own tokens: one for each connection that its pool opens.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/databricks/databricks-sdk-go"
	"github.com/databricks/databricks-sdk-go/service/postgres"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func main() {
	ctx := context.Background()
	// Reads DATABRICKS_HOST, DATABRICKS_CLIENT_ID and DATABRICKS_CLIENT_SECRET.
	workspace, err := databricks.NewWorkspaceClient()
	if err != nil {
		log.Fatal(err)
	}
	// Host, port, database, user, and how TLS is verified come from PGHOST and the like.
	config, err := pgxpool.ParseConfig("")
	if err != nil {
		log.Fatal(err)
	}
	config.MaxConns = 10
	config.MaxConnLifetime = 45 * time.Minute // shorter than a token's hour
	config.BeforeConnect = func(ctx context.Context, connection *pgx.ConnConfig) error {
		request := postgres.GenerateDatabaseCredentialRequest{Endpoint: os.Getenv("ENDPOINT_NAME")}
		credential, err := workspace.Postgres.GenerateDatabaseCredential(ctx, request)
		if err == nil {
			connection.Password = credential.Token
		}
		return err
	}
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
