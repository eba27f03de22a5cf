-- What shardmove keeps on a shard. One schema, made once; the objects of a single move are made beside these.
CREATE SCHEMA IF NOT EXISTS shardmove;
REVOKE ALL ON SCHEMA shardmove FROM PUBLIC;

-- Which catalog this shard belongs to, and the layout of this schema.
CREATE TABLE IF NOT EXISTS shardmove.about (
    cluster_id text NOT NULL,
    layout integer NOT NULL,
    CONSTRAINT one_row UNIQUE (layout)
);

-- The newest lease number seen here for a move. It outlives the move's objects: a coordinator that wakes after the move
-- has ended here, and makes or changes objects, would open or refuse a range that has gone on without it.
CREATE TABLE IF NOT EXISTS shardmove.lease (
    move_id text PRIMARY KEY,
    number bigint NOT NULL,
    has_ended boolean NOT NULL DEFAULT false
);

-- This shard's own record of its part in a move: the fence row. For us alone; writers look at the state sequence.
CREATE TABLE IF NOT EXISTS shardmove.fence (
    move_id text PRIMARY KEY,
    keyspace text NOT NULL,
    peer text NOT NULL,                 -- the shard at the other end
    standing text NOT NULL CHECK (standing IN ('owner', 'mirror', 'retired')),
    is_open boolean NOT NULL,
    is_whole boolean NOT NULL,          -- every row of the range is here: the gate lets everything through
    attempt bigint NOT NULL DEFAULT 0,  -- the newest attempt that closed or opened here
    lease_number bigint NOT NULL DEFAULT 0,
    fence_key bigint NOT NULL,          -- advisory lock of writers and closers
    mirror_key bigint NOT NULL,         -- advisory lock of catch-ups; never the same: a late catch-up would stall writers
    mirror_role name NOT NULL DEFAULT session_user,
    kept_before text[] NOT NULL DEFAULT '{}',  -- ranges that were kept fenced here when the move began
    fingerprint text
);

-- The tables of a move, parents first, as described when it began: everybody builds the same statements from these.
CREATE TABLE IF NOT EXISTS shardmove.moving_table (
    move_id text NOT NULL,
    ordinal integer NOT NULL,
    schema_name text NOT NULL,
    table_name text NOT NULL,
    key_column text NOT NULL,
    columns text[] NOT NULL,
    keyset text[] NOT NULL,
    keyset_types text[] NOT NULL,
    keyset_collated boolean[] NOT NULL,
    is_binary boolean NOT NULL,
    PRIMARY KEY (move_id, ordinal)
);

-- One row a committed batch, written by the transaction that wrote its rows. NULL is an open end of (after, upto].
CREATE TABLE IF NOT EXISTS shardmove.batch (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    move_id text NOT NULL,
    ordinal integer NOT NULL,
    after text[],
    upto text[],
    row_count bigint NOT NULL,
    size_bytes bigint NOT NULL,
    digest text NOT NULL,
    committed_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS batch_of_move ON shardmove.batch (move_id, ordinal);

-- Ranges that were given away for good: writes to them are refused here until they come back.
CREATE TABLE IF NOT EXISTS shardmove.kept (
    keyspace text NOT NULL,
    lower text,
    upper text
);

CREATE OR REPLACE FUNCTION shardmove.refuse_kept() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = '40001',
        MESSAGE = 'shardmove: the key of this row of ' || TG_TABLE_NAME || ' was given to another shard',
        HINT = 'retry the transaction where the route table says';
END $$;

CREATE OR REPLACE FUNCTION shardmove.refuse_truncate() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = '55000',
        MESSAGE = 'shardmove: TRUNCATE of ' || TG_TABLE_NAME || ' is refused while a range of it moves: no row trigger sees it',
        HINT = 'DELETE the rows, or wait for the move to end (shardmove status)';
END $$;
