// Npgsql and its pool with the sidecar: nothing here is about tokens.
// With an argument it connects to the database of the tenant that has this shard key.
using Npgsql;

string Variable(string name) =>
    Environment.GetEnvironmentVariable(name) ?? throw new InvalidOperationException($"{name} is not set");

var where = new NpgsqlConnectionStringBuilder
{
    Host = Variable("PGHOST"),
    Port = int.Parse(Variable("PGPORT")),
    Username = Variable("PGUSER"),
    Database = string.Join("@", [Variable("PGDATABASE"), .. args]),
    SslMode = SslMode.Disable, // TLS ends at the sidecar, which is on loopback
    MaxPoolSize = 10,
};
await using var source = NpgsqlDataSource.Create(where);
await using var command = source.CreateCommand("SELECT current_user, current_database()");
await using var row = await command.ExecuteReaderAsync();
await row.ReadAsync();
Console.WriteLine($"{row.GetString(0)} {row.GetString(1)}");
