-- What a shard knows of itself, version 1.0, for PostgreSQL 15 to 18. It runs in one transaction, and
-- may run again: a schema without a map has no version. Its owner needs CREATE on the database.

create schema if not exists shardmap_local;
create table if not exists shardmap_local.identity (
  map_id uuid primary key, map_name text not null, kind text not null, key_type text not null,
  normalise text not null, hash_version int not null,
  shard_id uuid not null unique, location text not null,  -- host:port/dbname as dialled
  status text not null default 'online' check (status in ('online','offline')),
  version bigint not null, store_major int not null default 1, store_minor int not null default 0);
create table if not exists shardmap_local.mapping (
  mapping_id uuid primary key,
  map_id uuid not null references shardmap_local.identity on delete cascade,
  lo bytea not null, hi bytea check (hi > lo),
  status text not null check (status in ('online','offline')),
  epoch bigint not null check (epoch > 0), op_id uuid, unique (map_id, lo));
create unlogged table if not exists shardmap_local.session (
  pid int not null, backend_start timestamptz not null,
  mapping_id uuid, epoch bigint, key bytea,  -- routing key (hash maps: 4 bytes); all null: a shard session
  proxy text not null,
  ticket bytea,  -- sha256 of what the proxy shows to register the same backend anew
  primary key (pid, backend_start));
create index if not exists session_mapping_id_idx on shardmap_local.session (mapping_id);
create or replace view shardmap_local.live_session as  -- unknown start counts as alive
  select s.* from shardmap_local.session s join pg_catalog.pg_stat_activity a
  on a.pid = s.pid and (a.backend_start = s.backend_start or a.backend_start is null);
create or replace function shardmap_local.admit(p_store_major int, p_map uuid, p_shard uuid, p_location text,
  p_mapping uuid, p_epoch bigint, p_key bytea, p_proxy text, p_secret bytea, p_ticket bytea,
  out verdict text, out current_epoch bigint, out pid int)
language plpgsql security definer
set search_path = pg_catalog, pg_temp set lock_timeout = '5s' as $$
declare i shardmap_local.identity; m shardmap_local.mapping; me timestamptz; n int;
begin
  pid := pg_backend_pid();
  -- First the row's lock: who waits here for a fence reads all below as the fence left it (R15).
  select * into m from shardmap_local.mapping where mapping_id = p_mapping and map_id = p_map for share;
  select * into i from shardmap_local.identity where map_id = p_map;
  if not found then verdict := 'map_missing'; return; end if;
  if i.store_major <> p_store_major then verdict := 'store_version'; return; end if;
  if i.shard_id <> p_shard or i.location <> p_location then verdict := 'wrong_shard'; return; end if;
  if m.mapping_id is null then verdict := 'mapping_missing'; return; end if;
  current_epoch := m.epoch;
  if m.status <> 'online' or i.status <> 'online' then verdict := 'offline'; return; end if;
  if m.epoch < p_epoch then verdict := 'shard_behind'; return; end if;
  if m.epoch > p_epoch or p_key < m.lo or p_key >= m.hi then verdict := 'stale'; return; end if;
  select a.backend_start into me from pg_stat_get_activity(pg_backend_pid()) a;
  if me is null then verdict := 'unregistered'; return; end if;
  delete from shardmap_local.session s where s.pid = pg_backend_pid() and s.backend_start <> me;
  insert into shardmap_local.session as o values (pg_backend_pid(), me, p_mapping, p_epoch, p_key, p_proxy, p_ticket)
    on conflict on constraint session_pkey do update set (mapping_id, epoch, key, proxy, ticket) = (excluded.mapping_id,
    excluded.epoch, excluded.key, excluded.proxy, excluded.ticket) where o.ticket = sha256(p_secret);
  get diagnostics n = row_count;
  verdict := case n when 1 then 'ok' else 'unregistered' end;
end $$;
revoke all on function shardmap_local.admit from public;
-- for each session role: grant usage on schema shardmap_local, execute on function shardmap_local.admit
