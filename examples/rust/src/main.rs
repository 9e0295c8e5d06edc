//! tokio-postgres with the sidecar: nothing here is about tokens.
//! With an argument it connects to the database of the tenant that has this shard key.

use std::env;
use tokio_postgres::NoTls;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    // In a URL the @ before a key is %40.
    let key = env::args().nth(1).map_or(String::new(), |key| format!("%40{key}"));
    let url = format!(
        "postgres://{}@{}:{}/{}{key}",
        env::var("PGUSER")?,
        env::var("PGHOST")?,
        env::var("PGPORT")?,
        env::var("PGDATABASE")?,
    );
    // TLS ends at the sidecar, which is on loopback.
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);
    let row = client.query_one("SELECT current_user::text, current_database()::text", &[]).await?;
    println!("{} {}", row.get::<_, &str>(0), row.get::<_, &str>(1));
    Ok(())
}
