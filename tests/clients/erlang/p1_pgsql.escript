#!/usr/bin/env escript
%% p1_pgsql. It has no pool of its own: twenty connections are kept, and one whose process has ended
%% is opened again when it is used, as ejabberd does.

-mode(compile).
-define(POOL, 20).
-define(QUERIES, 40).
-define(AGAIN_MILLISECONDS, 20000).

main(_) ->
    %% p1_pgsql prints that a socket closed, and its process reports why it ends.
    logger:remove_handler(default),
    Answers = group_leader(),
    group_leader(whereis(standard_error), self()),
    ok = io:setopts(Answers, [{encoding, latin1}]),
    ets:new(pool, [named_table, public]),
    serve(Answers).

serve(Answers) ->
    case io:get_line(Answers, "") of
        eof -> ok;
        Line ->
            [Name | Arguments] = string:lexemes(string:trim(Line), " "),
            Lines = try command(list_to_atom(Name), Arguments)
                    catch
                        throw:{cannot, Reason} -> ["cannot: " ++ Reason];
                        _:Error -> [io_lib:format("error: ~0p", [Error])]
                    end,
            [io:put_chars(Answers, [Said, "\n"]) || Said <- Lines ++ ["."]],
            serve(Answers)
    end.

command(version, []) ->
    ok = application:load(p1_pgsql),
    {ok, Version} = application:get_key(p1_pgsql, vsn),
    ["p1_pgsql " ++ Version];
command(connect, []) ->
    on(fun(Db) -> hd(rows(Db, "select current_database(), 1")) end);
command(key_in_name, [Database]) ->
    on(Database, fun(Db) -> hd(rows(Db, "select name from shard_identity")) end);
command(key_in_options, _) ->
    throw({cannot, "p1_pgsql sends nothing but user and database when it connects"});
command(types, []) ->
    on(fun types/1);
command(prepared, []) ->
    on(fun prepared/1);
command(cursor, []) ->
    on(fun cursor/1);
command(copy, []) ->
    throw({cannot, "p1_pgsql has no COPY"});
command(rollback, []) ->
    on(fun rollback/1);
command(cancel, []) ->
    throw({cannot, "p1_pgsql has no cancel"});
command(pool, []) ->
    [integer_to_list(at_once())];
command(again, []) ->
    Numbers = lists:seq(0, ?QUERIES - 1),
    Ask = fun(N) ->
              Sql = "select " ++ integer_to_list(N),
              tried_again(fun() -> ask(N rem ?POOL, Sql) end) == integer_to_list(N)
          end,
    true = lists:all(fun(Answered) -> Answered end, in_processes(Ask, Numbers)),
    ?POOL = tried_again(fun at_once/0),
    [integer_to_list(?QUERIES)];
command(refused, [Database]) ->
    case connect(Database) of
        {ok, Db} -> leave(Db), ["connected"];
        {error, Reason} -> [lists:flatten(io_lib:format("~0p", [Reason]))]
    end;
command(close, []) ->
    [leave(Db) || {_, Db} <- ets:tab2list(pool)],
    ["closed"].

%% The server may close before the driver's process has answered: then it has ended by that.
leave(Db) ->
    try pgsql:terminate(Db) catch exit:{tcp_close, _} -> ok end.

connect(Database) ->
    pgsql:connect([{host, os:getenv("PGHOST")},
                   {port, list_to_integer(os:getenv("PGPORT"))},
                   {user, os:getenv("PGUSER")},
                   {database, Database}]).

on(Do) ->
    on(os:getenv("PGDATABASE"), Do).

on(Database, Do) ->
    {ok, Db} = connect(Database),
    try Do(Db) after leave(Db) end.

%% The rows of one simple query, in text.
rows(Db, Sql) ->
    {ok, [{_, _, Rows}]} = pgsql:squery(Db, Sql),
    Rows.

utf8(Text) -> binary_to_list(unicode:characters_to_binary(Text)).

values() ->
    [{"bool", "t"},
     {"int2", "-32768"},
     {"int4", "2147483647"},
     {"int8", "-9223372036854775808"},
     {"float4", "1.5"},
     {"float8", "1e-300"},
     {"numeric", "12345678901234567890.123456789"},
     {"text", utf8("it's a \"quote\"\nanother line, ünïcödé ✓")},
     {"varchar", ""},
     {"bytea", "\\x00ff10"},
     {"date", "2024-02-29"},
     {"timestamptz", "2024-02-29 12:00:00.123456+00"},
     {"interval", "3 days 00:00:05.000007"},
     {"uuid", "5ca1ab1e-0000-4000-8000-00000000c0de"},
     {"json", "{\"a\": [1, null]}"},
     {"jsonb", utf8("{\"b\": \"ü\"}")},
     {"int4[]", "{1,2,3}"},
     {"text[]", "{a,NULL,\"\"}"}].


%% A parameter is sent in text (a binary of Erlang would go in binary) and read in binary, of which
%% p1_pgsql knows few types; then it is read in text. A NULL in binary ends its process.
types(Db) ->
    [begin
         Name = "value_" ++ integer_to_list(Number),
         {ok, _, _, _} = pgsql:prepare(Db, Name, "select $1::" ++ Type),
         {ok, {_, [[Binary]]}} = pgsql:execute(Db, Name, [Value]),
         Quoted = string:replace(Value, "'", "''", all),
         [Text] = rows(Db, lists:flatten(["select '", Quoted, "'::", Type, ", null::", Type])),
         io_lib:format("~0p ~0p", [Binary, Text])
     end || {Number, {Type, Value}} <- lists:enumerate(values())].

prepared(Db) ->
    Numbers = lists:seq(0, 299),
    Name = fun(N) -> "statement_" ++ integer_to_list(N) end,
    [{ok, _, _, _} = pgsql:prepare(Db, Name(N), "select " ++ integer_to_list(N) ++ " + $1::int4")
     || N <- Numbers],
    Answers = [begin
                   {ok, {_, [[{int4, Answer}]]}} = pgsql:execute(Db, Name(N), [1]),
                   binary_to_integer(Answer)
               end || N <- Numbers ++ Numbers],
    [integer_to_list(Number) || Number <- [length(Answers), lists:sum(Answers)]].

%% p1_pgsql reads a whole result; a large one is asked for in portions.
cursor(Db) ->
    {ok, _} = pgsql:squery(Db, "begin; declare portions cursor for"
                               " select n from generate_series(1, 100000) n"),
    Found = portions(Db, 0, 0),
    {ok, _} = pgsql:squery(Db, "commit"),
    [integer_to_list(Number) || Number <- Found].

portions(Db, Count, Sum) ->
    case [list_to_integer(N) || [N] <- rows(Db, "fetch 1000 from portions")] of
        [] -> [Count, Sum];
        Numbers -> portions(Db, Count + length(Numbers), Sum + lists:sum(Numbers))
    end.

%% p1_pgsql rolls back by itself after a simple query that failed.
rollback(Db) ->
    {ok, _} = pgsql:squery(Db, "create temp table kept (n int primary key)"),
    {ok, _} = pgsql:squery(Db, "begin"),
    {ok, _} = pgsql:squery(Db, "insert into kept values (1)"),
    {ok, [{error, Fields}]} = pgsql:squery(Db, "insert into kept values (1)"),
    [proplists:get_value(code, Fields) | hd(rows(Db, "select count(*) from kept"))].

%% Asks one connection of the pool, which is opened if it is not open. Throws what fails.
ask(Place, Sql) ->
    Db = case ets:lookup(pool, Place) of
             [{_, Open}] -> Open;
             [] ->
                 {ok, Opened} = connect(os:getenv("PGDATABASE")),
                 ets:insert(pool, {Place, Opened}),
                 Opened
         end,
    try
        [[Answer]] = rows(Db, Sql),
        Answer
    catch
        _:Error ->
            ets:delete(pool, Place),
            exit(Db, kill),
            error(Error)
    end.

%% How many backends twenty processes have at once.
at_once() ->
    Backend = fun(Place) -> ask(Place, "select pg_backend_pid() from pg_sleep(0.1)") end,
    length(lists:usort(in_processes(Backend, lists:seq(0, ?POOL - 1)))).

%% Calls something with each item, twenty at once, and returns the answers.
in_processes(Do, Items) when length(Items) =< ?POOL ->
    Self = self(),
    Processes = [spawn_monitor(fun() -> Self ! {self(), Do(Item)} end) || Item <- Items],
    [receive
         {Process, Answer} -> demonitor(Monitor, [flush]), Answer;
         {'DOWN', Monitor, process, Process, Reason} -> error(Reason)
     end || {Process, Monitor} <- Processes];
in_processes(Do, Items) ->
    {Now, Later} = lists:split(?POOL, Items),
    in_processes(Do, Now) ++ in_processes(Do, Later).

%% Tries for a while: what is not tested may fail.
tried_again(Do) ->
    tried_again(Do, erlang:monotonic_time(millisecond) + ?AGAIN_MILLISECONDS).

tried_again(Do, Deadline) ->
    try Do()
    catch
        _:Error ->
            case erlang:monotonic_time(millisecond) > Deadline of
                true -> error(Error);
                false -> timer:sleep(200), tried_again(Do, Deadline)
            end
    end.
