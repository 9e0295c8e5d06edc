# DBD::Pg. Perl's processes serve one request at a time; what pools for them is connect_cached, which
# pings a connection before it gives it again.

use strict;
use warnings;
use utf8;
use open qw(:std :encoding(UTF-8));
use DBI;
use DBD::Pg qw(:pg_types :async);
use Digest::MD5 qw(md5_hex);
use Time::HiRes qw(sleep time);
use constant { POOL => 20, QUERIES => 40, AGAIN_SECONDS => 20 };

my @VALUES = (
    ['bool', 't'],
    ['int2', '-32768'],
    ['int4', '2147483647'],
    ['int8', '-9223372036854775808'],
    ['float4', '1.5'],
    ['float8', '1e-300'],
    ['numeric', '12345678901234567890.123456789'],
    ['text', "it's a \"quote\"\nanother line, ünïcödé ✓"],
    ['varchar', ''],
    ['date', '2024-02-29'],
    ['timestamptz', '2024-02-29 12:00:00.123456+00'],
    ['interval', '3 days 00:00:05.000007'],
    ['uuid', '5ca1ab1e-0000-4000-8000-00000000c0de'],
    ['json', '{"a": [1, null]}'],
    ['jsonb', '{"b": "ü"}'],
    ['int4[]', [1, 2, 3]],
    ['text[]', ['a', undef, '']],
    ['int8', undef],
);
my %ATTRIBUTES = (AutoCommit => 1, RaiseError => 1, PrintError => 0);

sub connection {
    my ($settings) = @_;
    return DBI->connect("dbi:Pg:$settings", '', '', {%ATTRIBUTES});
}

# Each place has a connection of its own: DBI tells cached ones apart by their attributes.
sub place {
    my ($place) = @_;
    return DBI->connect_cached('dbi:Pg:', '', '', {%ATTRIBUTES, private_place => $place});
}

sub shard {
    my $connection = connection(@_);
    my ($name) = $connection->selectrow_array('select name from shard_identity');
    $connection->disconnect;
    return $name;
}

# Calls something with a connection and closes that.
sub on {
    my ($do) = @_;
    return sub {
        my $connection = connection('');
        my @lines = $do->($connection);
        $connection->disconnect;
        return @lines;
    };
}

# DBD::Pg has all values in text, but bytea goes in binary.
sub types {
    my ($connection) = @_;
    my @lines;
    for my $value (@VALUES) {
        my ($type, $sent) = @$value;
        my ($read) = $connection->selectrow_array("select ?::$type", undef, $sent);
        $read = '{' . join(',', map { $_ // 'NULL' } @$read) . '}' if ref $read;
        push @lines, "$type " . ($read // 'NULL') =~ s/\n/\\n/r;
    }
    my $statement = $connection->prepare('select ?::bytea');
    $statement->bind_param(1, "\x00\xff\x10", { pg_type => PG_BYTEA });
    $statement->execute;
    return @lines, 'bytea ' . unpack('H*', ($statement->fetchrow_array)[0]);
}

# A statement that is prepared by `prepare_cached` stays; DBD::Pg prepares it on the server.
sub prepared {
    my ($connection) = @_;
    my ($count, $sum) = (0, 0);
    for my $n (0 .. 299, 0 .. 299) {
        my $statement = $connection->prepare_cached("select $n + ?::int", { pg_prepare_now => 1 });
        $sum += ($connection->selectrow_array($statement, undef, 1))[0];
        $count++;
    }
    return $count, $sum;
}

# DBD::Pg reads a whole result; a large one is asked for in portions.
sub cursor {
    my ($connection) = @_;
    $connection->begin_work;
    $connection->do('declare portions cursor for select n from generate_series(1, 100000) n');
    my ($count, $sum) = (0, 0);
    while (my @numbers = @{ $connection->selectcol_arrayref('fetch 1000 from portions') }) {
        $count += @numbers;
        $sum += $_ for @numbers;
    }
    $connection->commit;
    return $count, $sum;
}

sub copy {
    my ($connection) = @_;
    $connection->do('create temp table copied (n int, s text)');
    $connection->do('copy copied from stdin');
    $connection->pg_putcopydata("$_\trow $_\n") for 0 .. 9999;
    $connection->pg_putcopyend;
    $connection->do('copy copied to stdout');
    my ($row, @rows) = ('');
    push @rows, $row while $connection->pg_getcopydata($row) >= 0;
    return scalar @rows, md5_hex(join '', @rows);
}

sub rollback {
    my ($connection) = @_;
    $connection->do('create temp table kept (n int primary key)');
    $connection->begin_work;
    eval { $connection->do('insert into kept values (1)') for 1 .. 2 };
    my $state = $connection->state;
    $connection->rollback;
    return $state, $connection->selectrow_array('select count(*) from kept');
}

sub cancel {
    my ($connection) = @_;
    my ($pid) = $connection->selectrow_array('select pg_backend_pid()');
    $connection->do('select pg_sleep(60)', { pg_async => PG_ASYNC });
    my $other = connection('');
    my $sleeping = "select count(*) from pg_stat_activity where pid = ? and wait_event = 'PgSleep'";
    my $deadline = time + AGAIN_SECONDS;
    until (($other->selectrow_array($sleeping, undef, $pid))[0]) {
        die 'the query has not begun' if time > $deadline;
    }
    $other->disconnect;
    $connection->pg_cancel;
    return $connection->state, $connection->selectrow_array('select 1');
}

# All twenty ask at once: each waits for its answer after all have asked.
sub opened {
    my @pool = map { place($_) } 0 .. POOL - 1;
    my %backends;
    for my $connection (@pool) {
        $connection->do('select pg_backend_pid()', { pg_async => PG_ASYNC });
    }
    for my $connection (@pool) {
        $connection->pg_result;
        $backends{ ($connection->selectrow_array('select pg_backend_pid()'))[0] } = 1;
    }
    return scalar keys %backends;
}

sub again {
    my $answered = 0;
    for my $n (0 .. QUERIES - 1) {
        my $answer = tried_again(sub { (place($n % POOL)->selectrow_array("select $n"))[0] });
        $answered++ if $answer == $n;
    }
    my $opened = tried_again(\&opened);
    die "$opened connections are open" if $opened != POOL;
    return $answered;
}

# Tries for a while: what is not tested may fail.
sub tried_again {
    my ($do) = @_;
    my $deadline = time + AGAIN_SECONDS;
    while (1) {
        my $found = eval { $do->() };
        return $found if defined $found;
        die $@ if time > $deadline;
        sleep 0.2;
    }
}

# What libpq refuses has no result, so no SQLSTATE.
sub refused {
    my ($database) = @_;
    return 'connected' if eval { connection("dbname=$database")->disconnect };
    return "$DBI::state $DBI::errstr";
}

sub close_all {
    place($_)->disconnect for 0 .. POOL - 1;
    return 'closed';
}

my %COMMANDS = (
    version => sub { "DBD::Pg $DBD::Pg::VERSION, DBI $DBI::VERSION" },
    connect => on(sub { $_[0]->selectrow_array('select current_database(), 1') }),
    key_in_name => sub { shard("dbname=$_[0]") },
    key_in_options => sub { shard("options='-c $_[0]'") },
    types => on(\&types),
    prepared => on(\&prepared),
    cursor => on(\&cursor),
    copy => on(\&copy),
    rollback => on(\&rollback),
    cancel => on(\&cancel),
    pool => \&opened,
    again => \&again,
    refused => \&refused,
    close => \&close_all,
);

$| = 1;
while (my $line = <STDIN>) {
    my ($name, @arguments) = split ' ', $line;
    my @lines = eval { $COMMANDS{$name}->(@arguments) };
    if (my $error = $@) {
        $error =~ s/\n/ /g;
        @lines = ('error: ' . ($DBI::state || 'none') . " $error");
    }
    print map { "$_\n" } @lines, '.';
}
