import com.databricks.sdk.WorkspaceClient;
import com.databricks.sdk.service.postgres.GenerateDatabaseCredentialRequest;
import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.io.PrintWriter;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.util.Properties;
import java.util.concurrent.TimeUnit;
import java.util.logging.Logger;
import javax.sql.DataSource;

/** An application that gets its own tokens: one for each connection that its pool opens. */
class OwnTokens {
    public static void main(String[] arguments) throws SQLException {
        var config = new HikariConfig();
        config.setDataSource(new TokenDataSource());
        config.setMaximumPoolSize(10);
        config.setMaxLifetime(TimeUnit.MINUTES.toMillis(45)); // shorter than a token's hour
        try (var pool = new HikariDataSource(config);
                var connection = pool.getConnection();
                var statement = connection.createStatement();
                var row = statement.executeQuery("SELECT current_user, current_database()")) {
            row.next();
            System.out.println(row.getString(1) + " " + row.getString(2));
        }
    }
}

/** Opens connections whose password is a new token. */
class TokenDataSource implements DataSource {
    // Reads DATABRICKS_HOST, DATABRICKS_CLIENT_ID and DATABRICKS_CLIENT_SECRET.
    private final WorkspaceClient workspace = new WorkspaceClient();

    @Override
    public Connection getConnection() throws SQLException {
        var request = new GenerateDatabaseCredentialRequest().setEndpoint(System.getenv("ENDPOINT_NAME"));
        var properties = new Properties();
        properties.setProperty("user", System.getenv("PGUSER"));
        var credential = workspace.postgres().generateDatabaseCredential(request);
        properties.setProperty("password", credential.getToken());
        properties.setProperty("sslmode", System.getenv("PGSSLMODE"));
        var url = String.format(
                "jdbc:postgresql://%s:%s/%s",
                System.getenv("PGHOST"), System.getenv("PGPORT"), System.getenv("PGDATABASE"));
        return DriverManager.getConnection(url, properties);
    }

    @Override
    public Connection getConnection(String user, String password) throws SQLException {
        return getConnection();
    }

    @Override
    public PrintWriter getLogWriter() {
        return null;
    }

    @Override
    public void setLogWriter(PrintWriter writer) {}

    @Override
    public void setLoginTimeout(int seconds) {}

    @Override
    public int getLoginTimeout() {
        return 0;
    }

    @Override
    public Logger getParentLogger() {
        return Logger.getGlobal();
    }

    @Override
    public <T> T unwrap(Class<T> kind) throws SQLException {
        throw new SQLException("this wraps nothing");
    }

    @Override
    public boolean isWrapperFor(Class<?> kind) {
        return false;
    }
}
