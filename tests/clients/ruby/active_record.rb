# ActiveRecord with its own pool, on pg.

require "active_record"
require "pg"
require_relative "commands"

# The connection of one command.
class Alone < ActiveRecord::Base
  self.abstract_class = true
end

class Number < Alone
  self.primary_key = "n"
end

# The pool of all others.
class Pooled < ActiveRecord::Base
  self.abstract_class = true
end

class ActiveRecordPool
  SETTINGS = {
    adapter: "postgresql",
    host: ENV["PGHOST"],
    port: ENV["PGPORT"],
    username: ENV["PGUSER"],
    database: ENV["PGDATABASE"],
    sslmode: "disable",
    pool: POOL,
    statement_limit: 100,
    checkout_timeout: AGAIN_SECONDS,
  }.freeze

  def version
    "ActiveRecord #{ActiveRecord.version}, pg #{PG::VERSION}"
  end

  def connect
    on { |connection| connection.select_rows("select current_database(), 1") }
  end

  def key_in_name(database)
    shard(database: database)
  end

  def key_in_options(option)
    shard(options: "-c #{option}")
  end

  # ActiveRecord has all values in text.
  def types
    on do |connection|
      VALUES.map do |type, value|
        result = connection.exec_query("select $1::#{type}", nil, [bind(value)], prepare: true)
        "#{type} #{result.cast_values.inspect}"
      end
    end
  end

  def prepared
    on do |connection|
      answers = Array.new(600) do |n|
        sql = "select #{n % 300} + $1::int"
        connection.exec_query(sql, nil, [bind(1)], prepare: true).cast_values.first
      end
      [answers.size, answers.sum]
    end
  end

  # ActiveRecord has no cursor: it reads many rows in batches, each by the last key of the one before.
  def cursor
    on do |connection|
      connection.execute("create temp table numbers (n int primary key)")
      connection.execute("insert into numbers select generate_series(1, 100000)")
      numbers = Number.in_batches(of: 10_000).flat_map { |batch| batch.pluck(:n) }
      [numbers.size, numbers.sum]
    end
  end

  # COPY is the driver's.
  def copy
    on do |connection|
      connection.execute("create temp table copied (n int, s text)")
      raw = connection.raw_connection
      raw.copy_data("copy copied from stdin") do
        10_000.times { |n| raw.put_copy_data("#{n}\trow #{n}\n") }
      end
      rows = []
      raw.copy_data("copy copied to stdout") do
        while (row = raw.get_copy_data)
          rows << row
        end
      end
      [rows.size, checksum(rows.join)]
    end
  end

  def rollback
    on do |connection|
      connection.execute("create temp table numbers (n int primary key)")
      begin
        Number.transaction { 2.times { Number.create!(n: 1) } }
      rescue ActiveRecord::RecordNotUnique => error
        state = sqlstate(error)
      end
      [state, Number.count]
    end
  end

  # The cancel is the driver's.
  def cancel
    on do |connection|
      pid = connection.select_value("select pg_backend_pid()")
      cancelling = Thread.new do
        Pooled.establish_connection(SETTINGS)
        wait_until { Pooled.connection.select_value(SLEEPING % pid) == 1 }
        Pooled.remove_connection
        connection.raw_connection.cancel
      end
      begin
        connection.execute("select pg_sleep(60)")
      rescue ActiveRecord::QueryCanceled => error
        state = sqlstate(error)
      end
      cancelling.join
      [state, connection.select_value("select 1")]
    end
  end

  def pool
    Pooled.establish_connection(SETTINGS)
    at_once(self)
  end

  def again
    ask_again(self)
  end

  def hold
    with { |connection| yield connection.select_value("select pg_backend_pid()") }
  end

  def query(number)
    with { |connection| connection.select_value("select #{number}") }
  end

  # What libpq refuses has no result, so no SQLSTATE.
  def refused(database)
    on(database: database, &:reconnect!)
  rescue ActiveRecord::ActiveRecordError => error
    "#{sqlstate(error)} #{error.message}".lines(chomp: true)
  end

  def close
    Pooled.remove_connection
    "closed"
  end

  private

  def on(**settings, &block)
    Alone.establish_connection(SETTINGS.merge(settings))
    Alone.connection_pool.with_connection(&block)
  ensure
    Alone.remove_connection
  end

  def with(&block)
    Pooled.connection_pool.with_connection(&block)
  end

  def shard(**settings)
    on(**settings) { |connection| connection.select_value("select name from shard_identity") }
  end

  def bind(value)
    ActiveRecord::Relation::QueryAttribute.new("value", value, ActiveRecord::Type::Value.new)
  end
end

serve(ActiveRecordPool.new)
