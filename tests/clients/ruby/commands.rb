# Reads commands on standard input and answers them, for both of the Ruby programs.
# A program has a method for each command; it returns the lines of the answer.

require "digest"

POOL = 20
QUERIES = 40
AGAIN_SECONDS = 20
SLEEPING = "select count(*) from pg_stat_activity where pid = %s and wait_event = 'PgSleep'".freeze

# Types and values in PostgreSQL's text format.
VALUES = [
  ["bool", "t"],
  ["int2", "-32768"],
  ["int4", "2147483647"],
  ["int8", "-9223372036854775808"],
  ["float4", "1.5"],
  ["float8", "1e-300"],
  ["numeric", "12345678901234567890.123456789"],
  ["text", "it's a \"quote\"\nanother line, ünïcödé ✓"],
  ["varchar", ""],
  ["bytea", "\\x00ff10"],
  ["date", "2024-02-29"],
  ["timestamptz", "2024-02-29 12:00:00.123456+00"],
  ["interval", "3 days 00:00:05.000007"],
  ["uuid", "5ca1ab1e-0000-4000-8000-00000000c0de"],
  ["json", '{"a": [1, null]}'],
  ["jsonb", '{"b": "ü"}'],
  ["int4[]", "{1,2,3}"],
  ["text[]", '{a,NULL,""}'],
  ["int8", nil],
].freeze

# What a driver cannot do by its nature; the text says why.
class Cannot < StandardError; end

def serve(program)
  $stdin.each_line(chomp: true) do |line|
    lines =
      begin
        Array(program.public_send(*line.split))
      rescue Cannot => reason
        ["cannot: #{reason.message}"]
      rescue StandardError => error
        ["error: #{sqlstate(error)} #{error.message.gsub("\n", " ")}"]
      end
    puts lines, "."
    $stdout.flush
  end
end

def sqlstate(error)
  error = error.cause if error.cause.is_a?(PG::Error)
  error.result.error_field(PG::PG_DIAG_SQLSTATE) if error.respond_to?(:result) && error.result
end

def checksum(text)
  Digest::SHA256.hexdigest(text)[0, 16]
end

# Returns how many backends twenty threads have at once. `hold` takes a connection, gives its
# backend's number to its block, and gives the connection back after it.
def at_once(program)
  taken = Queue.new
  release = Queue.new
  threads = Array.new(POOL) do
    Thread.new do
      Thread.current.report_on_exception = false
      program.hold do |backend|
        taken << true
        release.pop
        backend
      end
    ensure
      taken << true
    end
  end
  POOL.times { taken.pop }
  release.close
  threads.map(&:value).uniq.size
end

# Returns how many of forty queries were answered; then twenty connections are open again.
def ask_again(program)
  numbers = Queue.new
  QUERIES.times { |n| numbers << n }
  numbers.close
  threads = Array.new(POOL) do
    Thread.new do
      answers = []
      while (n = numbers.pop)
        answers << tried_again { program.query(n) }
      end
      answers
    end
  end
  answers = threads.flat_map(&:value).sort
  raise "answers were #{answers}" unless answers == [*0...QUERIES]

  opened = tried_again { at_once(program) }
  raise "#{opened} connections are open" unless opened == POOL

  answers.size
end

# Tries for a while: what a pool does not test may fail.
def tried_again
  deadline = Time.now + AGAIN_SECONDS
  begin
    yield
  rescue StandardError
    raise if Time.now > deadline

    sleep 0.2
    retry
  end
end

# Waits until a query has begun.
def wait_until
  deadline = Time.now + AGAIN_SECONDS
  until yield
    raise "the query has not begun" if Time.now > deadline

    sleep 0.01
  end
end
