import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.util.Properties;
import java.util.concurrent.TimeUnit;
import org.postgresql.PGConnection;
import org.postgresql.replication.PGReplicationStream;
import org.postgresql.util.DriverInfo;

/**
 * Follows a table by a replication stream, opened as Debezium opens it: its settings of the
 * connection, its slot, its options of pgoutput. Asked for a `change`, it makes three, reads them
 * from the stream and prints the types of the messages.
 */
class Replication {
    static final String TABLE = "followed";
    static final String PUBLICATION = "dbz_publication";
    static final String SLOT = "debezium_" + System.getenv("PGDATABASE");
    static final long READ_SECONDS_MAX = 30;

    public static void main(String[] arguments) throws Exception {
        var input = new BufferedReader(new InputStreamReader(System.in));
        try (var general = connection(new Properties()); var streaming = connection(replicating())) {
            execute(general, "create table " + TABLE + " (n int primary key, s text)");
            execute(general, "create publication " + PUBLICATION + " for table " + TABLE);
            execute(streaming, "CREATE_REPLICATION_SLOT " + SLOT + " LOGICAL pgoutput");
            try (var stream = stream(streaming)) {
                var number = 0;
                for (String line; (line = input.readLine()) != null; ) {
                    if (line.equals("change")) change(general, ++number);
                    var version = "pgjdbc " + DriverInfo.DRIVER_VERSION;
                    System.out.println(line.equals("change") ? read(stream) : version);
                    System.out.println(".");
                }
            }
            execute(streaming, "DROP_REPLICATION_SLOT " + SLOT);
        }
    }

    static Properties replicating() {
        var made = new Properties();
        made.setProperty("replication", "database");
        made.setProperty("preferQueryMode", "simple"); // no other is possible
        made.setProperty("assumeMinServerVersion", "9.4");
        made.setProperty("ApplicationName", "Debezium Streaming");
        made.setProperty("tcpKeepAlive", "true");
        return made;
    }

    static Connection connection(Properties more) throws SQLException {
        var url = "jdbc:postgresql://%s:%s/%s?sslmode=%s".formatted(
                System.getenv("PGHOST"),
                System.getenv("PGPORT"),
                System.getenv("PGDATABASE"),
                System.getenv("PGSSLMODE"));
        more.setProperty("user", System.getenv("PGUSER"));
        return DriverManager.getConnection(url, more);
    }

    static void execute(Connection connection, String sql) throws SQLException {
        try (var statement = connection.createStatement()) {
            statement.execute(sql);
        }
    }

    static PGReplicationStream stream(Connection connection) throws SQLException {
        return connection.unwrap(PGConnection.class).getReplicationAPI()
                .replicationStream()
                .logical()
                .withSlotName(SLOT)
                .withSlotOption("proto_version", 1)
                .withSlotOption("publication_names", PUBLICATION)
                .withStatusInterval(10, TimeUnit.SECONDS)
                .start();
    }

    static void change(Connection connection, int n) throws SQLException {
        execute(connection, "insert into " + TABLE + " values (" + n + ", 'a row\n√')");
        execute(connection, "update " + TABLE + " set s = 'changed' where n = " + n);
        execute(connection, "delete from " + TABLE + " where n = " + n);
    }

    /** Return the types of the messages up to the third commit. */
    static String read(PGReplicationStream stream) throws Exception {
        var types = new StringBuilder();
        var deadline = System.nanoTime() + TimeUnit.SECONDS.toNanos(READ_SECONDS_MAX);
        for (var commits = 0; commits < 3; ) {
            var message = stream.readPending(); // returns at once
            if (message == null) {
                if (System.nanoTime() > deadline) throw new IllegalStateException(types.toString());
                Thread.sleep(10);
                continue;
            }
            var type = (char) message.get();
            types.append(type);
            if (type == 'C') commits++;
            stream.setAppliedLSN(stream.getLastReceiveLSN());
            stream.setFlushedLSN(stream.getLastReceiveLSN());
            stream.forceUpdateStatus();
        }
        return types.toString();
    }
}
