//! tokio-postgres. It has no pool of its own, and Debian has none for it: twenty clients are kept,
//! and one that is closed is opened again when it is taken, as the pools for it do.

use chrono::{DateTime, NaiveDate, Utc};
use futures_util::{future::join_all, pin_mut, SinkExt, StreamExt, TryStreamExt};
use std::collections::hash_map::DefaultHasher;
use std::collections::HashSet;
use std::env::var;
use std::hash::{Hash, Hasher};
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};
use tokio::sync::{Barrier, Mutex};
use tokio::task::JoinHandle;
use tokio_postgres::{connect, Client, NoTls, SimpleQueryMessage};

const POOL: usize = 20;
const QUERIES: usize = 40;
const AGAIN: Duration = Duration::from_secs(20);
const SLEEPING: &str =
    "select count(*) from pg_stat_activity where pid = $1 and wait_event = 'PgSleep'";

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Answer = Result<String, Failure>;

/// A client, and the task that moves its bytes until the client is dropped.
struct Connected {
    client: Client,
    task: JoinHandle<()>,
}

impl Connected {
    async fn open(database: &str, settings: &str) -> Result<Self, Failure> {
        let found = |name| var(name).unwrap_or_default();
        let url = format!(
            "postgresql://{}@{}:{}/{}?sslmode=disable{}",
            found("PGUSER"),
            found("PGHOST"),
            found("PGPORT"),
            database.replace('@', "%40"),
            settings
        );
        let (client, connection) = connect(&url, NoTls).await?;
        let task = tokio::spawn(async move { connection.await.unwrap_or_default() });
        Ok(Self { client, task })
    }

    /// Opens a connection to the database of the environment.
    async fn usual() -> Result<Self, Failure> {
        Self::open(&var("PGDATABASE")?, "").await
    }

    async fn close(self) {
        drop(self.client);
        let _ = self.task.await;
    }
}

type Pool = Vec<Mutex<Option<Connected>>>;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let pool: Pool = (0..POOL).map(|_| Mutex::new(None)).collect();
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap_or_default();
        let (name, argument) = line.split_once(' ').unwrap_or((&line, ""));
        let lines = answer(&pool, name, argument).await.unwrap_or_else(|error| {
            format!("error: {} {}", sqlstate(&error), error).replace('\n', " ")
        });
        println!("{lines}\n.");
        let _ = std::io::stdout().flush();
    }
    close(&pool).await;
}

async fn answer(pool: &Pool, name: &str, argument: &str) -> Answer {
    match name {
        "version" => Ok(version()),
        "refused" => refused(argument).await,
        "key_in_name" => shard(argument, "").await,
        "key_in_options" => {
            let options = format!("&options=-c%20{}", argument.replace('=', "%3D"));
            shard(&var("PGDATABASE")?, &options).await
        }
        "pool" => Ok(at_once(pool).await?.to_string()),
        "again" => again(pool).await,
        "close" => Ok(close(pool).await),
        _ => {
            let mut connected = Connected::usual().await?;
            let answer = alone(&mut connected.client, name).await;
            connected.close().await;
            answer
        }
    }
}

async fn alone(client: &mut Client, name: &str) -> Answer {
    match name {
        "connect" => {
            let row = client.query_one("select current_database()::text, 1", &[]).await?;
            Ok(format!("{} {}", row.get::<_, String>(0), row.get::<_, i32>(1)))
        }
        "types" => types(client).await,
        "prepared" => prepared(client).await,
        "cursor" => cursor(client).await,
        "copy" => copy(client).await,
        "rollback" => rollback(client).await,
        "cancel" => cancel(client).await,
        _ => Err(format!("no command {name}").into()),
    }
}

/// The version in the lock file, which the build wrote.
fn version() -> String {
    let lock = include_str!("../Cargo.lock");
    let package = lock.split("name = \"tokio-postgres\"").nth(1).unwrap_or_default();
    format!("tokio-postgres {}", package.split('"').nth(1).unwrap_or_default())
}

fn sqlstate(error: &Failure) -> String {
    let found = error.downcast_ref::<tokio_postgres::Error>();
    let code = found.and_then(|error| error.code());
    code.map_or("none".into(), |code| code.code().into())
}

async fn shard(database: &str, settings: &str) -> Answer {
    let connected = Connected::open(database, settings).await?;
    let row = connected.client.query_one("select name from shard_identity", &[]).await?;
    connected.close().await;
    Ok(row.get(0))
}

/// Sends a value in binary, and reads it and a NULL in binary; then reads it in text.
macro_rules! there_and_back {
    ($client:ident, $lines:ident, $($name:literal $type:ty: $value:expr;)*) => {$({
        let value: $type = $value;
        let sql = concat!("select $1::", $name, ", null::", $name, ", $1::", $name, "::text");
        let row = $client.query_one(sql, &[&value]).await?;
        let (read, null): ($type, Option<$type>) = (row.get(0), row.get(1));
        $lines.push(format!("{} binary {read:?} {null:?}", $name));
        let literal = row.get::<_, String>(2).replace('\'', "''");
        let sql = format!("select '{literal}'::{}", $name);
        for message in $client.simple_query(&sql).await? {
            if let SimpleQueryMessage::Row(row) = message {
                $lines.push(format!("{} text {:?}", $name, row.get(0)));
            }
        }
    })*};
}

/// numeric and interval have no type in tokio-postgres.
async fn types(client: &Client) -> Answer {
    let mut lines: Vec<String> = vec![];
    there_and_back!(client, lines,
        "bool" bool: true;
        "int2" i16: i16::MIN;
        "int4" i32: i32::MAX;
        "int8" i64: i64::MIN;
        "float4" f32: 1.5;
        "float8" f64: 1e-300;
        "text" String: "it's a \"quote\"\nanother line, ünïcödé ✓".into();
        "varchar" String: "".into();
        "bytea" Vec<u8>: vec![0, 255, 16];
        "date" NaiveDate: "2024-02-29".parse()?;
        "timestamptz" DateTime<Utc>: "2024-02-29T12:00:00.123456Z".parse()?;
        "uuid" uuid::Uuid: "5ca1ab1e-0000-4000-8000-00000000c0de".parse()?;
        "json" serde_json::Value: serde_json::json!({"a": [1, null]});
        "jsonb" serde_json::Value: serde_json::json!({"b": "ü"});
        "int4[]" Vec<i32>: vec![1, 2, 3];
        "text[]" Vec<Option<String>>: vec![Some("a".into()), None, Some("".into())];
    );
    Ok(lines.join("\n"))
}

/// tokio-postgres caches nothing: a program keeps its statements.
async fn prepared(client: &Client) -> Answer {
    let mut statements = vec![];
    for n in 0..300 {
        statements.push(client.prepare(&format!("select {n} + $1::int")).await?);
    }
    let (mut count, mut sum) = (0, 0);
    for statement in statements.iter().chain(&statements) {
        sum += client.query_one(statement, &[&1]).await?.get::<_, i32>(0);
        count += 1;
    }
    Ok(format!("{count} {sum}"))
}

async fn cursor(client: &mut Client) -> Answer {
    let transaction = client.transaction().await?;
    let portal = transaction.bind("select n from generate_series(1, 100000) n", &[]).await?;
    let (mut count, mut sum) = (0, 0);
    loop {
        let rows = transaction.query_portal(&portal, 1000).await?;
        if rows.is_empty() {
            return Ok(format!("{count} {sum}"));
        }
        count += rows.len();
        sum += rows.iter().map(|row| i64::from(row.get::<_, i32>(0))).sum::<i64>();
    }
}

async fn copy(client: &Client) -> Answer {
    client.batch_execute("create temp table copied (n int, s text)").await?;
    let sink = client.copy_in("copy copied from stdin").await?;
    pin_mut!(sink);
    for n in 0..10_000 {
        sink.send(bytes::Bytes::from(format!("{n}\trow {n}\n"))).await?;
    }
    let copied = sink.finish().await?;
    let out: Vec<bytes::Bytes> = client.copy_out("copy copied to stdout").await?.try_collect().await?;
    let mut hasher = DefaultHasher::new();
    out.concat().hash(&mut hasher);
    Ok(format!("{copied} {} {:x}", out.len(), hasher.finish()))
}

async fn rollback(client: &mut Client) -> Answer {
    client.batch_execute("create temp table kept (n int primary key)").await?;
    let transaction = client.transaction().await?;
    transaction.execute("insert into kept values (1)", &[]).await?;
    let failed = transaction.execute("insert into kept values (1)", &[]).await;
    transaction.rollback().await?;
    let count: i64 = client.query_one("select count(*) from kept", &[]).await?.get(0);
    Ok(format!("{} {count}", sqlstate(&failed.err().ok_or("inserted twice")?.into())))
}

async fn cancel(client: &Client) -> Answer {
    let other = Connected::usual().await?;
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).await?.get(0);
    let cancelling = async {
        let deadline = Instant::now() + AGAIN;
        while other.client.query_one(SLEEPING, &[&pid]).await?.get::<_, i64>(0) == 0 {
            if Instant::now() > deadline {
                return Err("the query has not begun".into());
            }
        }
        Ok::<_, Failure>(client.cancel_token().cancel_query(NoTls).await?)
    };
    let (failed, cancelled) = tokio::join!(client.batch_execute("select pg_sleep(60)"), cancelling);
    cancelled?;
    other.close().await;
    let one: i32 = client.query_one("select 1", &[]).await?.get(0);
    Ok(format!("{} {one}", sqlstate(&failed.err().ok_or("not cancelled")?.into())))
}

/// Asks the client of one place, which is opened if it is closed.
async fn ask(place: &mut Option<Connected>, sql: &str) -> Result<i32, Failure> {
    if !matches!(place, Some(kept) if !kept.client.is_closed()) {
        *place = Some(Connected::usual().await?);
    }
    let kept = place.as_ref().ok_or("it was opened")?;
    Ok(kept.client.query_one(sql, &[]).await?.get(0))
}

/// Returns how many backends twenty tasks have at once.
async fn at_once(pool: &Pool) -> Result<usize, Failure> {
    let barrier = Barrier::new(POOL);
    let held = pool.iter().map(|place| async {
        let mut place = place.lock().await;
        let backend = ask(&mut place, "select pg_backend_pid()").await;
        barrier.wait().await;
        backend
    });
    let backends: Result<HashSet<i32>, Failure> = join_all(held).await.into_iter().collect();
    Ok(backends?.len())
}

async fn again(pool: &Pool) -> Answer {
    let deadline = Instant::now() + AGAIN;
    let asked = (0..QUERIES).map(|n| async move {
        let mut place = pool[n % POOL].lock().await;
        loop {
            match ask(&mut place, &format!("select {n}")).await {
                Err(_) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(200)).await
                }
                answer => return answer.map(|answer| usize::from(answer as usize == n)),
            }
        }
    });
    let answered: usize = futures_util::stream::iter(asked)
        .buffer_unordered(POOL)
        .try_fold(0, |sum, one| async move { Ok(sum + one) })
        .await?;
    match at_once(pool).await? {
        POOL => Ok(answered.to_string()),
        opened => Err(format!("{opened} connections are open").into()),
    }
}

async fn refused(database: &str) -> Answer {
    let error = match Connected::open(database, "").await {
        Ok(connected) => {
            connected.close().await;
            return Ok("connected".into());
        }
        Err(error) => error,
    };
    let found = error.downcast_ref::<tokio_postgres::Error>();
    let refusal = match found.and_then(|error| error.as_db_error()) {
        Some(refusal) => refusal,
        None => return Err(error),
    };
    let (detail, hint) = (refusal.detail(), refusal.hint());
    Ok(format!(
        "{} {}\n{}\n{}",
        refusal.code().code(),
        refusal.message(),
        detail.unwrap_or_default(),
        hint.unwrap_or("hint not shown")
    ))
}

async fn close(pool: &Pool) -> String {
    for place in pool {
        if let Some(kept) = place.lock().await.take() {
            kept.close().await;
        }
    }
    "closed".into()
}
