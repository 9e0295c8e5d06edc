import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.io.BufferedReader;
import java.io.ByteArrayOutputStream;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.io.StringReader;
import java.math.BigDecimal;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.sql.Array;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.sql.Types;
import java.time.LocalDate;
import java.time.OffsetDateTime;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashSet;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.UUID;
import java.util.concurrent.Callable;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.jar.JarFile;
import java.util.stream.Collectors;
import java.util.stream.IntStream;
import org.postgresql.PGConnection;
import org.postgresql.util.DriverInfo;
import org.postgresql.util.PGInterval;
import org.postgresql.util.PSQLException;

/** pgjdbc with the pool of HikariCP. Reads commands on standard input and answers them. */
class Jdbc {
    static final int POOL = 20;
    static final int QUERIES = 40;
    static final long AGAIN_MILLISECONDS_MAX = 20_000;
    static final long LIFETIME_MINUTES = 45;
    // No row, which fails, until the query has begun.
    static final String SLEEPING =
            "select 1 from pg_stat_activity where wait_event = 'PgSleep' and pid = %s";
    static final String SHARD = "select name from shard_identity";
    static final PrintStream OUT = new PrintStream(System.out, false, StandardCharsets.UTF_8);

    static HikariDataSource pool;

    interface Command {
        List<?> answer(String argument) throws Exception;
    }

    interface Use<T> {
        T with(Connection connection) throws Exception;
    }

    public static void main(String[] arguments) throws Exception {
        var input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line; (line = input.readLine()) != null; ) {
            var words = line.split(" ", 2);
            List<?> lines;
            try {
                lines = command(words[0]).answer(words.length > 1 ? words[1] : "");
            } catch (Exception error) {
                lines = List.of("error: " + sqlstate(error) + " " + oneLine(error.toString()));
            }
            lines.forEach(OUT::println);
            OUT.println(".");
            OUT.flush();
        }
        close();
    }

    static Command command(String name) {
        return switch (name) {
            case "version" -> argument -> version();
            case "connect" -> argument -> connect();
            case "key_in_name" -> database -> List.of(shard(url(database), new Properties()));
            case "key_in_options" -> Jdbc::keyInOptions;
            case "types" -> argument -> types();
            case "prepared" -> argument -> prepared();
            case "cursor" -> argument -> cursor();
            case "copy" -> argument -> copy();
            case "rollback" -> argument -> rollback();
            case "cancel" -> argument -> cancel();
            case "pool" -> argument -> openPool();
            case "again" -> argument -> again();
            case "refused" -> Jdbc::refused;
            case "close" -> argument -> close();
            default -> throw new IllegalArgumentException(name);
        };
    }

    // Where it connects to: host, port, user and database of the environment.

    static String env(String name) {
        return System.getenv(name);
    }

    static String url(String database) {
        var name = URLEncoder.encode(database, StandardCharsets.UTF_8);
        return "jdbc:postgresql://%s:%s/%s?sslmode=%s"
                .formatted(env("PGHOST"), env("PGPORT"), name, env("PGSSLMODE"));
    }

    static <T> T using(String url, Properties more, Use<T> use) throws Exception {
        more.setProperty("user", env("PGUSER"));
        try (var connection = DriverManager.getConnection(url, more)) {
            return use.with(connection);
        }
    }

    static <T> T using(Use<T> use) throws Exception {
        return using(url(env("PGDATABASE")), new Properties(), use);
    }

    static Properties setting(String name, String value) {
        var made = new Properties();
        made.setProperty(name, value);
        return made;
    }

    static String one(Connection connection, String sql) throws SQLException {
        try (var statement = connection.createStatement();
                var rows = statement.executeQuery(sql)) {
            if (!rows.next()) throw new SQLException("no row: " + sql);
            return rows.getString(1);
        }
    }

    static void execute(Connection connection, String sql) throws SQLException {
        try (var statement = connection.createStatement()) {
            statement.execute(sql);
        }
    }

    static String sqlstate(Exception error) {
        return error instanceof SQLException sql ? sql.getSQLState() : "";
    }

    static String oneLine(String text) {
        return text.replaceAll("\\s+", " ");
    }

    static List<?> version() throws Exception {
        var hikari = HikariDataSource.class.getProtectionDomain().getCodeSource().getLocation();
        try (var jar = new JarFile(hikari.getPath())) {
            var version = jar.getManifest().getMainAttributes().getValue("Bundle-Version");
            return List.of("pgjdbc " + DriverInfo.DRIVER_VERSION + ", HikariCP " + version);
        }
    }

    static List<?> connect() throws Exception {
        return using(c -> List.of(one(c, "select current_database()"), one(c, "select 1")));
    }

    static String shard(String url, Properties more) throws Exception {
        return using(url, more, connection -> one(connection, SHARD));
    }

    static List<?> keyInOptions(String option) throws Exception {
        return List.of(shard(url(env("PGDATABASE")), setting("options", "-c " + option)));
    }

    static Map<String, Object> values() throws SQLException {
        var bytes = new byte[256];
        for (var n = 0; n < bytes.length; n++) bytes[n] = (byte) n;
        var values = new LinkedHashMap<String, Object>();
        values.put("bool", true);
        values.put("int2", Short.MIN_VALUE);
        values.put("int4", Integer.MAX_VALUE);
        values.put("int8", Long.MIN_VALUE);
        values.put("float4", 1.5f);
        values.put("float8", 1e-300);
        values.put("numeric", new BigDecimal("12345678901234567890.123456789"));
        values.put("text", "it's a \"quote\"\nanother line, \\ ünïcödé ✓");
        values.put("varchar", "");
        values.put("bytea", bytes);
        values.put("date", LocalDate.parse("2024-02-29"));
        values.put("timestamptz", OffsetDateTime.parse("2024-02-29T12:00:00.123456Z"));
        values.put("interval", new PGInterval("1 year 2 months 3 days 04:05:06.789"));
        values.put("uuid", UUID.fromString("5ca1ab1e-0000-4000-8000-00000000c0de"));
        values.put("json", "{\"a\": [1, null]}");
        values.put("jsonb", "{\"b\": \"ü\"}");
        values.put("int4[]", new Integer[] {1, -2, 3});
        values.put("text[]", new String[] {"a,b", null, "", "\""});
        values.put("int8 ", null);
        return values;
    }

    static List<?> types() throws Exception {
        var lines = new ArrayList<String>();
        // A statement that is prepared at once has its values in binary.
        for (var format : Map.of("0", "text", "-1", "binary").entrySet())
            using(url(env("PGDATABASE")), setting("prepareThreshold", format.getKey()), c -> {
                for (var value : values().entrySet()) {
                    var read = sent(c, value.getKey(), value.getValue());
                    lines.add(oneLine(value.getKey() + " " + format.getValue() + " " + read));
                }
                return null;
            });
        lines.sort(null);
        return lines;
    }

    static String sent(Connection connection, String type, Object value) throws SQLException {
        try (var statement = connection.prepareStatement("select ?::" + type)) {
            if (value == null) statement.setNull(1, Types.BIGINT);
            else if (value instanceof Object[] items)
                statement.setArray(1, connection.createArrayOf(type.replace("[]", ""), items));
            else statement.setObject(1, value);
            try (var rows = statement.executeQuery()) {
                rows.next();
                var read = rows.getObject(1);
                if (read instanceof byte[] bytes) return HexFormat.of().formatHex(bytes);
                if (read instanceof Array array) return Arrays.toString((Object[]) array.getArray());
                return String.valueOf(read);
            }
        }
    }

    static List<?> prepared() throws Exception {
        return using(url(env("PGDATABASE")), setting("prepareThreshold", "1"), connection -> {
            var count = 0;
            var sum = 0;
            for (var round = 0; round < 2; round++)
                for (var n = 0; n < 300; n++, count++)
                    sum += number(connection, "select " + n + " + ?", 1);
            return List.of(count, sum);
        });
    }

    static int number(Connection connection, String sql, int parameter) throws SQLException {
        try (var statement = connection.prepareStatement(sql)) {
            statement.setInt(1, parameter);
            try (var rows = statement.executeQuery()) {
                rows.next();
                return rows.getInt(1);
            }
        }
    }

    static List<?> cursor() throws Exception {
        return using(connection -> {
            connection.setAutoCommit(false); // else it reads all rows at once
            try (var statement = connection.createStatement()) {
                statement.setFetchSize(1000);
                var count = 0;
                var sum = 0L;
                var rows = statement.executeQuery("select generate_series(1, 100000)");
                for (; rows.next(); count++) sum += rows.getInt(1);
                return List.of(count, sum);
            }
        });
    }

    static List<?> copy() throws Exception {
        var in = IntStream.range(0, 10_000)
                .mapToObj(n -> n + "\trow\\t" + n + "\n")
                .collect(Collectors.joining());
        return using(connection -> {
            execute(connection, "create temp table copied (n int, s text)");
            var copying = connection.unwrap(PGConnection.class).getCopyAPI();
            copying.copyIn("copy copied from stdin", new StringReader(in));
            var out = new ByteArrayOutputStream();
            var count = copying.copyOut("copy copied to stdout", out);
            var digest = MessageDigest.getInstance("SHA-256").digest(out.toByteArray());
            return List.of(count, HexFormat.of().formatHex(digest, 0, 8));
        });
    }

    static List<?> rollback() throws Exception {
        return using(connection -> {
            var state = "none";
            execute(connection, "create temp table kept (n int primary key)");
            connection.setAutoCommit(false);
            try {
                execute(connection, "insert into kept values (1)");
                execute(connection, "insert into kept values (1)");
            } catch (SQLException error) {
                state = error.getSQLState();
                connection.rollback();
            }
            return List.of(state, one(connection, "select count(*) from kept"));
        });
    }

    static List<?> cancel() throws Exception {
        return using(connection -> using(other -> {
            var pid = one(connection, "select pg_backend_pid()");
            var state = "none";
            var threads = Executors.newSingleThreadExecutor();
            try (var statement = connection.createStatement()) {
                var cancelled = threads.submit(() -> {
                    triedAgain(() -> one(other, SLEEPING.formatted(pid)));
                    statement.cancel();
                    return null;
                });
                try {
                    statement.execute("select pg_sleep(60)");
                } catch (SQLException error) {
                    state = error.getSQLState();
                }
                cancelled.get();
            } finally {
                threads.shutdown();
            }
            return List.of(state, one(connection, "select 1"));
        }));
    }

    static List<?> openPool() throws Exception {
        var config = new HikariConfig();
        config.setJdbcUrl(url(env("PGDATABASE")));
        config.setUsername(env("PGUSER"));
        config.setMaximumPoolSize(POOL);
        config.setMaxLifetime(TimeUnit.MINUTES.toMillis(LIFETIME_MINUTES));
        pool = new HikariDataSource(config);
        return List.of(backendsAtOnce());
    }

    static int backendsAtOnce() throws Exception {
        var barrier = new CyclicBarrier(POOL);
        return new HashSet<>(atOnce(POOL, n -> {
            try (var connection = pool.getConnection()) {
                var pid = one(connection, "select pg_backend_pid()");
                barrier.await(AGAIN_MILLISECONDS_MAX, TimeUnit.MILLISECONDS);
                return pid;
            }
        })).size();
    }

    static List<?> again() throws Exception {
        var answers = new HashSet<>(atOnce(QUERIES, n -> triedAgain(() -> {
            try (var connection = pool.getConnection()) {
                return number(connection, "select ?", n);
            }
        })));
        var opened = triedAgain(Jdbc::backendsAtOnce);
        if (opened != POOL) throw new IllegalStateException(opened + " connections are open");
        return List.of(answers.size());
    }

    static List<?> refused(String database) throws Exception {
        try {
            return List.of("it was not refused", shard(url(database), new Properties()));
        } catch (PSQLException error) {
            var hint = error.getServerErrorMessage().getHint();
            return List.of(
                    "SQLSTATE " + error.getSQLState(),
                    "message " + oneLine(error.getMessage()),
                    hint == null ? "hint not shown" : "hint " + oneLine(hint));
        }
    }

    static List<?> close() {
        if (pool != null) pool.close();
        return List.of("closed");
    }

    interface Numbered<T> {
        T of(int n) throws Exception;
    }

    /** Return what this many tasks return, twenty at a time. */
    static <T> List<T> atOnce(int count, Numbered<T> task) throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(POOL);
        try {
            var tasks = IntStream.range(0, count)
                    .mapToObj(n -> (Callable<T>) () -> task.of(n))
                    .toList();
            var results = new ArrayList<T>();
            for (Future<T> done : threads.invokeAll(tasks)) results.add(done.get());
            return results;
        } finally {
            threads.shutdown();
        }
    }

    /** Return what something returns, tried for a while: a query on a broken connection fails. */
    static <T> T triedAgain(Callable<T> attempt) throws Exception {
        var deadline = System.currentTimeMillis() + AGAIN_MILLISECONDS_MAX;
        for (; ; ) {
            try {
                return attempt.call();
            } catch (Exception error) {
                if (System.currentTimeMillis() > deadline) throw error;
                Thread.sleep(200);
            }
        }
    }
}
