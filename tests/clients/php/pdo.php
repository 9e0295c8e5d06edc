<?php
// PDO. A process of PHP serves one request at a time and has no pool; what it has is persistent
// connections, which PDO tests before it uses them. Run with `persistent`, it opens these.

const POOL = 20;
const QUERIES = 40;
const AGAIN_SECONDS = 20;

const VALUES = [
    ['bool', 't'],
    ['int2', '-32768'],
    ['int4', '2147483647'],
    ['int8', '-9223372036854775808'],
    ['float4', '1.5'],
    ['float8', '1e-300'],
    ['numeric', '12345678901234567890.123456789'],
    ['text', "it's a \"quote\"\nanother line, ünïcödé ✓"],
    ['varchar', ''],
    ['bytea', '\x00ff10'],
    ['date', '2024-02-29'],
    ['timestamptz', '2024-02-29 12:00:00.123456+00'],
    ['interval', '3 days 00:00:05.000007'],
    ['uuid', '5ca1ab1e-0000-4000-8000-00000000c0de'],
    ['json', '{"a": [1, null]}'],
    ['jsonb', '{"b": "ü"}'],
    ['int4[]', '{1,2,3}'],
    ['text[]', '{a,NULL,""}'],
    ['int8', null],
];

// What the driver cannot do by its nature; the text says why.
class Cannot extends Exception
{
}

class Program
{
    private array $pool = [];

    public function __construct(private bool $persistent)
    {
    }

    public function version(): string
    {
        $how = $this->persistent ? 'PDO, persistent connections' : 'PDO';
        return "$how, PHP " . PHP_VERSION;
    }

    public function connect(): array
    {
        return self::open()->query('select current_database(), 1')->fetch();
    }

    public function key_in_name(string $database): string
    {
        return self::shard("dbname=$database");
    }

    public function key_in_options(string $option): string
    {
        return self::shard("options='-c $option'");
    }

    // PDO has all values in text, but what is bound as LOB goes in binary.
    public function types(): iterable
    {
        $connection = self::open();
        foreach (VALUES as [$type, $value]) {
            $statement = $connection->prepare("select ?::$type");
            $statement->execute([$value]);
            yield "$type " . self::shown($statement->fetchColumn());
        }
        $statement = $connection->prepare('select ?::bytea');
        $statement->bindValue(1, "\x00\xff\x10", PDO::PARAM_LOB);
        $statement->execute();
        yield 'bytea in binary ' . self::shown($statement->fetchColumn());
    }

    // PDO caches nothing: a program keeps its statements.
    public function prepared(): array
    {
        $connection = self::open();
        $statements = [];
        for ($n = 0; $n < 300; $n++) {
            $statements[] = $connection->prepare("select $n + ?::int");
        }
        $answers = [];
        foreach ([...$statements, ...$statements] as $statement) {
            $statement->execute([1]);
            $answers[] = $statement->fetchColumn();
        }
        return [count($answers), array_sum($answers)];
    }

    // PDO reads a whole result; a large one is asked for in portions.
    public function cursor(): array
    {
        $connection = self::open();
        $connection->beginTransaction();
        $connection->exec('declare portions cursor for select n from generate_series(1, 100000) n');
        [$count, $sum] = [0, 0];
        while ($rows = $connection->query('fetch 1000 from portions')->fetchAll(PDO::FETCH_COLUMN)) {
            $count += count($rows);
            $sum += array_sum($rows);
        }
        $connection->commit();
        return [$count, $sum];
    }

    public function copy(): array
    {
        $connection = self::open();
        $connection->exec('create temp table copied (n int, s text)');
        $rows = array_map(fn ($n) => "$n\trow $n\n", range(0, 9999));
        $connection->pgsqlCopyFromArray('copied', $rows);
        $out = $connection->pgsqlCopyToArray('copied');
        return [count($out), md5(implode($out))];
    }

    public function rollback(): array
    {
        $connection = self::open();
        $connection->exec('create temp table kept (n int primary key)');
        $connection->beginTransaction();
        try {
            $connection->exec('insert into kept values (1)');
            $connection->exec('insert into kept values (1)');
        } catch (PDOException $error) {
            $connection->rollBack();
        }
        return [$error->getCode(), $connection->query('select count(*) from kept')->fetchColumn()];
    }

    public function cancel(): never
    {
        throw new Cannot('PDO has neither a cancel nor a timeout of a query');
    }

    public function pool(): int
    {
        foreach (range(0, POOL - 1) as $n) {
            $this->pool[$n] = $this->take($n);
        }
        return $this->opened();
    }

    // Without persistent connections a request that fails is followed by one that connects.
    public function again(): int
    {
        $answered = 0;
        for ($n = 0; $n < QUERIES; $n++) {
            $answer = self::tried_again(function () use ($n) {
                $place = $n % POOL;
                try {
                    if ($this->persistent) {
                        $this->pool[$place] = null;
                        $this->pool[$place] = $this->take($place);
                    }
                    $this->pool[$place] ??= $this->take($place);
                    return $this->pool[$place]->query("select $n")->fetchColumn();
                } catch (PDOException $error) {
                    $this->pool[$place] = null;
                    throw $error;
                }
            });
            $answered += (int) ($answer === $n);
        }
        if (($opened = $this->opened()) !== POOL) {
            throw new Exception("$opened connections are open");
        }
        return $answered;
    }

    // PDO has no SQLSTATE of a refusal: it says 08006, and 7 is libpq's "bad connection".
    public function refused(string $database): string
    {
        try {
            self::open("dbname=$database");
            return 'connected';
        } catch (PDOException $error) {
            return $error->getMessage();
        }
    }

    // A persistent connection is closed when its process ends.
    public function close(): string
    {
        $this->pool = [];
        return 'closed';
    }

    private static function open(string $settings = '', bool|string $persistent = false): PDO
    {
        // libpq reads the environment; PDO asks for a name of the database or the host.
        $settings = $settings ?: 'host=' . getenv('PGHOST');
        return new PDO("pgsql:$settings", null, null, [
            PDO::ATTR_ERRMODE => PDO::ERRMODE_EXCEPTION,
            PDO::ATTR_DEFAULT_FETCH_MODE => PDO::FETCH_NUM,
            PDO::ATTR_PERSISTENT => $persistent,
        ]);
    }

    private static function shard(string $settings): string
    {
        return self::open($settings)->query('select name from shard_identity')->fetchColumn();
    }

    private function take(int $place): PDO
    {
        return self::open('', $this->persistent ? "connection $place" : false);
    }

    private function opened(): int
    {
        $backends = array_map(
            fn ($connection) => $connection->query('select pg_backend_pid()')->fetchColumn(),
            $this->pool
        );
        return count(array_unique($backends));
    }

    private static function tried_again(callable $do): mixed
    {
        $deadline = microtime(true) + AGAIN_SECONDS;
        while (true) {
            try {
                return $do();
            } catch (PDOException $error) {
                if (microtime(true) > $deadline) {
                    throw $error;
                }
                usleep(50_000);
            }
        }
    }

    private static function shown(mixed $value): string
    {
        return json_encode(is_resource($value) ? bin2hex(stream_get_contents($value)) : $value);
    }
}

$program = new Program(in_array('persistent', $argv));
while (($line = fgets(STDIN)) !== false) {
    [$name, $argument] = [...explode(' ', trim($line)), ''];
    try {
        $lines = $argument === '' ? $program->$name() : $program->$name($argument);
        foreach (is_iterable($lines) ? $lines : [$lines] as $one) {
            echo $one, "\n";
        }
    } catch (Cannot $reason) {
        echo 'cannot: ', $reason->getMessage(), "\n";
    } catch (Throwable $error) {
        echo "error: {$error->getCode()} ", strtr($error->getMessage(), "\n", ' '), "\n";
    }
    echo ".\n";
}
