import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.sql.SQLException;

/**
 * The same application with the sidecar: nothing in it is about tokens.
 *
 * <p>With an argument it connects to the database of the tenant that has this shard key. In a URL
 * the @ before a key is %40.
 */
class Sidecar {
    public static void main(String[] arguments) throws SQLException {
        var database = System.getenv("PGDATABASE") + (arguments.length > 0 ? "%40" + arguments[0] : "");
        var config = new HikariConfig();
        // TLS ends at the sidecar, which is on loopback.
        config.setJdbcUrl(String.format(
                "jdbc:postgresql://%s:%s/%s?sslmode=disable",
                System.getenv("PGHOST"), System.getenv("PGPORT"), database));
        config.setUsername(System.getenv("PGUSER"));
        config.setMaximumPoolSize(10);
        config.setMinimumIdle(1);
        try (var pool = new HikariDataSource(config);
                var connection = pool.getConnection();
                var statement = connection.createStatement();
                var row = statement.executeQuery("SELECT current_user, current_database()")) {
            row.next();
            System.out.println(row.getString(1) + " " + row.getString(2));
        }
    }
}
