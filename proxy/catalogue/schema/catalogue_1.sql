-- The catalogue of shard maps, version 1.0, for PostgreSQL 15 to 18. It runs in one transaction, once:
-- the version in store_version says that it has. Its owner needs CREATE on the database, no more.

create schema shardmap;
create type shardmap.keyrange as range (subtype = bytea);
create table shardmap.store_version (major int not null, minor int not null,
  only_row bool primary key default true check (only_row));
insert into shardmap.store_version values (1, 0);
create table shardmap.shard_map (
  map_id uuid primary key default gen_random_uuid(),
  name text not null check (name ~ '^[A-Za-z0-9_-]{1,50}$'),
  kind text not null check (kind in ('list','range','hash')),
  key_type text not null check (key_type in ('int4','int8','uuid','text','bytea','timestamptz')),
  normalise text not null default 'none' check (normalise in ('none','ascii_lower','nfc')),
  hash_version int not null default 1 check (hash_version = 1),
  session_roles text[] not null default '{}',  -- logins that `grant session` named
  version bigint not null default 1);
create unique index on shardmap.shard_map (lower(name));
create table shardmap.shard (
  shard_id uuid primary key default gen_random_uuid(),
  map_id uuid not null references shardmap.shard_map,
  name text not null check (name ~ '^[A-Za-z0-9_-]{1,63}$'),
  host text not null check (host = lower(host)),
  port int not null default 5432 check (port between 1 and 65535),
  dbname text not null,
  endpoint text not null default '',  -- resource that tokens are minted for; both empty: any of the workspace
  instance text not null default '', check (endpoint = '' or instance = ''),
  workspace text not null default '',  -- NAME of [workspaces.NAME]; '' is [workspace]
  status text not null default 'online' check (status in ('online','offline')),
  version bigint not null default 1, op_id uuid,
  unique (map_id, name), unique (map_id, host, port, dbname), unique (map_id, shard_id));
create table shardmap.mapping (
  mapping_id uuid primary key default gen_random_uuid(),
  map_id uuid not null references shardmap.shard_map, shard_id uuid not null,
  lo bytea not null, hi bytea check (hi > lo),  -- '' = -inf, null = +inf
  status text not null default 'online' check (status in ('online','offline')),
  sessions text not null default 'kill' check (sessions in ('kill','drain','keep')),
  drain_until timestamptz,
  epoch bigint not null default 1 check (epoch > 0),
  lock_owner uuid, lock_label text, locked_until timestamptz, op_id uuid,
  span shardmap.keyrange not null generated always as (shardmap.keyrange(
    uuid_send(map_id) || '\x00'::bytea || lo,
    uuid_send(map_id) || coalesce('\x00'::bytea || hi, '\x01'::bytea))) stored,
  foreign key (map_id, shard_id) references shardmap.shard (map_id, shard_id),
  exclude using gist (span with &&));  -- alone: equal bounds are 23P01 as well
create index on shardmap.mapping (map_id, lo);
create table shardmap.op_log (
  op_id uuid primary key default gen_random_uuid(), map_id uuid not null,
  kind text not null, state text not null default 'begun',
  body jsonb not null,  -- arguments and the rows as they were
  progress jsonb,  -- rows copied and to copy, sessions left, last round
  owner text not null, created_at timestamptz not null default now(),
  updated_at timestamptz not null default now());
create function shardmap.announce() returns trigger language plpgsql
set search_path = pg_catalog, pg_temp as $$
declare r record; v bigint; ids jsonb; id text := tg_table_name || '_id';
begin
  for r in select map_id, count(*) n from changed group by map_id loop
    ids := null;
    if r.n <= 64 then
      select jsonb_agg(to_jsonb(c) -> id) into ids from changed c where c.map_id = r.map_id;
    end if;
    update shardmap.shard_map set version = version + 1 where map_id = r.map_id returning version into v;
    perform pg_notify('shardmap', jsonb_strip_nulls(jsonb_build_object('m', r.map_id, 'v', v,
      case tg_table_name when 'shard' then 's' else 'ids' end, ids))::text);
  end loop;
  return null;
end $$;
do $$ declare t text; e text; begin
  foreach t in array array['mapping','shard'] loop
    foreach e in array array['insert','update','delete'] loop
      execute format('create trigger announce_%2$s after %2$s on shardmap.%1$s referencing %3$s table as changed
        for each statement execute function shardmap.announce()', t, e, case e when 'delete' then 'old' else 'new' end);
    end loop;
  end loop;
end $$;
