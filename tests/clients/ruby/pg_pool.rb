# pg with the pool of the gem connection_pool.

require "pg"
require "connection_pool"
require_relative "commands"

class PgPool
  def version
    "pg #{PG::VERSION}, connection_pool #{ConnectionPool::VERSION}"
  end

  def connect
    on { |connection| connection.exec("select current_database(), 1").values }
  end

  def key_in_name(database)
    shard(dbname: database)
  end

  def key_in_options(option)
    shard(options: "-c #{option}")
  end

  # Parameters in text and, where pg has an encoder, in binary; results in both formats.
  def types
    on do |connection|
      VALUES.product([0, 1]).map do |(type, value), format|
        result = connection.exec_params("select $1::#{type}", [value], format)
        read = result.getvalue(0, 0)
        back = format.zero? ? read : sent_back(connection, type, read)
        "#{type}, format #{format}: #{read.inspect} #{back.inspect}"
      end
    end
  end

  # pg caches nothing: a program names its statements.
  def prepared
    on do |connection|
      300.times { |n| connection.prepare("statement #{n}", "select #{n} + $1::int") }
      answers = Array.new(600) do |n|
        connection.exec_prepared("statement #{n % 300}", [1]).getvalue(0, 0).to_i
      end
      [answers.size, answers.sum]
    end
  end

  def cursor
    on do |connection|
      connection.send_query("select n from generate_series(1, 100000) n")
      connection.set_single_row_mode
      numbers = []
      connection.get_result.stream_each { |row| numbers << row["n"].to_i }
      connection.get_last_result
      [numbers.size, numbers.sum]
    end
  end

  def copy
    on do |connection|
      connection.exec("create temp table copied (n int, s text)")
      connection.copy_data("copy copied from stdin", PG::TextEncoder::CopyRow.new) do
        10_000.times { |n| connection.put_copy_data([n, "row\t#{n}"]) }
      end
      rows = []
      connection.copy_data("copy copied to stdout") do
        while (row = connection.get_copy_data)
          rows << row
        end
      end
      [rows.size, checksum(rows.join)]
    end
  end

  def rollback
    on do |connection|
      connection.exec("create temp table kept (n int primary key)")
      begin
        connection.transaction { 2.times { connection.exec("insert into kept values (1)") } }
      rescue PG::Error => error
        state = sqlstate(error)
      end
      [state, connection.exec("select count(*) from kept").getvalue(0, 0)]
    end
  end

  def cancel
    on do |connection|
      pid = connection.exec("select pg_backend_pid()").getvalue(0, 0)
      cancelling = Thread.new do
        on { |other| wait_until { other.exec(SLEEPING % pid).getvalue(0, 0) == "1" } }
        connection.cancel
      end
      begin
        connection.exec("select pg_sleep(60)")
      rescue PG::Error => error
        state = sqlstate(error)
      end
      cancelling.join
      [state, connection.exec("select 1").getvalue(0, 0)]
    end
  end

  def pool
    @pool = ConnectionPool.new(size: POOL, timeout: AGAIN_SECONDS) { PG.connect }
    at_once(self)
  end

  def again
    ask_again(self)
  end

  def hold
    with { |connection| yield connection.exec("select pg_backend_pid()").getvalue(0, 0) }
  end

  def query(number)
    with { |connection| connection.exec_params("select $1::int", [number]).getvalue(0, 0).to_i }
  end

  # What libpq refuses has no result, so no SQLSTATE.
  def refused(database)
    PG.connect(dbname: database).close
  rescue PG::Error => error
    "#{sqlstate(error)} #{error.message}".lines(chomp: true)
  end

  def close
    @pool.shutdown(&:close)
    "closed"
  end

  private

  def on(**settings)
    connection = PG.connect(**settings)
    yield connection
  ensure
    connection&.close
  end

  # The pool keeps what is broken; its user resets it.
  def with
    @pool.with do |connection|
      yield connection
    rescue PG::Error
      connection.reset if connection.status == PG::CONNECTION_BAD
      raise
    end
  end

  def shard(**settings)
    on(**settings) { |connection| connection.exec("select name from shard_identity").getvalue(0, 0) }
  end

  def sent_back(connection, type, binary)
    parameter = { value: binary, format: 1 }
    connection.exec_params("select $1::#{type}::text", [parameter]).getvalue(0, 0)
  end
end

serve(PgPool.new)
