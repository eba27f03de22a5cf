-- Hook 1: the tables of the catalog, and the constraints that hold whoever writes to them, by whatever statement.
-- What shardmove itself calls is in functions.sql. Conditions that it reports have SQLSTATEs of its own:
--   SM001 lease lost   SM002 epoch conflict   SM003 attempt decided   SM004 illegal transition   SM005 not found
--   SM006 refused
-- Rows are locked in this order everywhere: move, attempt, cluster, keyspace, shard.

-- One row. `id` tells this catalog from others on the shards; `epoch` is the cell that publishers compare and set.
CREATE TABLE shardmove_catalog.cluster (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    epoch bigint NOT NULL
);

CREATE TABLE shardmove_catalog.shard (
    name text PRIMARY KEY CHECK (name <> ''),
    dsn text NOT NULL
);
COMMENT ON COLUMN shardmove_catalog.shard.dsn IS 'without a password, always';

CREATE TABLE shardmove_catalog.keyspace (
    name text PRIMARY KEY CHECK (name <> ''),
    key_type text NOT NULL CHECK (key_type IN ('smallint', 'integer', 'bigint', 'text', 'uuid')),
    scheme text NOT NULL CHECK (scheme IN ('range', 'hash')),
    bound_type text NOT NULL GENERATED ALWAYS AS (CASE scheme WHEN 'hash' THEN 'bigint' ELSE key_type END) STORED,
    reference_tables text[] NOT NULL DEFAULT '{}'
);

CREATE TABLE shardmove_catalog.keyspace_table (
    keyspace text NOT NULL REFERENCES shardmove_catalog.keyspace ON DELETE CASCADE,
    table_name text NOT NULL,
    key_column text NOT NULL,
    PRIMARY KEY (keyspace, table_name)
);

CREATE SEQUENCE shardmove_catalog.plan_number;
CREATE TABLE shardmove_catalog.plan (
    id text PRIMARY KEY DEFAULT 'p' || nextval('shardmove_catalog.plan_number'),
    kind text NOT NULL,
    description text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE SEQUENCE shardmove_catalog.move_number;
CREATE TABLE shardmove_catalog.move (
    id text PRIMARY KEY DEFAULT 'm' || nextval('shardmove_catalog.move_number'),
    plan_id text NOT NULL REFERENCES shardmove_catalog.plan,
    ordinal integer NOT NULL,
    keyspace text NOT NULL REFERENCES shardmove_catalog.keyspace,
    source text NOT NULL,
    target text NOT NULL,
    state text NOT NULL DEFAULT 'pending' CHECK (state IN (
        'pending', 'initializing', 'copying', 'verifying', 'ready', 'switched', 'cleaning', 'completed',
        'rolling_back', 'rolled_back')),
    state_since timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease_number bigint NOT NULL DEFAULT 0,
    last_attempt bigint NOT NULL DEFAULT 0,
    paused boolean NOT NULL DEFAULT false,
    error text,
    identities jsonb NOT NULL DEFAULT '{}',
    stats jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    is_finished boolean NOT NULL GENERATED ALWAYS AS (state IN ('completed', 'rolled_back')) STORED,
    UNIQUE (plan_id, ordinal),
    CHECK (source <> target)
);
CREATE INDEX move_unfinished ON shardmove_catalog.move (keyspace) WHERE NOT is_finished;

CREATE TABLE shardmove_catalog.move_range (
    move_id text NOT NULL REFERENCES shardmove_catalog.move,
    lower text,
    upper text
);
CREATE INDEX move_range_move ON shardmove_catalog.move_range (move_id);

-- Who holds a move. `number` equals move.lease_number from takeover to takeover; a beat touches this row alone.
CREATE TABLE shardmove_catalog.lease (
    move_id text PRIMARY KEY REFERENCES shardmove_catalog.move,
    number bigint NOT NULL,
    holder text,
    host text NOT NULL,
    process_id integer NOT NULL,
    backend_pid integer NOT NULL,
    backend_start timestamptz NOT NULL,
    acquired_at timestamptz NOT NULL,
    beat_at timestamptz NOT NULL
);

CREATE TABLE shardmove_catalog.attempt (
    move_id text NOT NULL REFERENCES shardmove_catalog.move,
    number bigint NOT NULL,
    direction text NOT NULL CHECK (direction IN ('forward', 'back')),
    outcome text NOT NULL DEFAULT 'open' CHECK (outcome IN ('open', 'flipped', 'abandoned')),
    lease_number bigint NOT NULL,
    opened_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    decided_at timestamptz,
    stall_ms double precision,
    reason text,
    PRIMARY KEY (move_id, number),
    CHECK ((outcome = 'open') = (decided_at IS NULL))
);
CREATE UNIQUE INDEX attempt_one_open ON shardmove_catalog.attempt (move_id) WHERE outcome = 'open';

CREATE TABLE shardmove_catalog.event (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    move_id text,
    plan_id text,
    kind text NOT NULL,
    detail jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX event_move ON shardmove_catalog.event (move_id, id);

-- An epoch and its ranges are made by one transaction and never changed by another. `ranges` counts the rows of
-- `route`: counting them is what makes the deferred check look at an epoch once more after each statement.
CREATE TABLE shardmove_catalog.route_epoch (
    epoch bigint PRIMARY KEY CHECK (epoch >= 0),
    published_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    reason text NOT NULL,
    ranges integer NOT NULL DEFAULT 0,
    made_by xid8 NOT NULL DEFAULT pg_current_xact_id()
);

CREATE TABLE shardmove_catalog.route (
    epoch bigint NOT NULL REFERENCES shardmove_catalog.route_epoch ON DELETE CASCADE,
    keyspace text NOT NULL,
    lower text,
    upper text,
    shard text NOT NULL,
    move_id text REFERENCES shardmove_catalog.move,
    held boolean NOT NULL DEFAULT false
);
CREATE INDEX route_epoch_keyspace ON shardmove_catalog.route (epoch, keyspace);

ALTER TABLE shardmove_catalog.cluster ADD CONSTRAINT cluster_epoch_is_published
    FOREIGN KEY (epoch) REFERENCES shardmove_catalog.route_epoch DEFERRABLE INITIALLY DEFERRED;

-- The subquery, not a join, so that it is read by the index and never by looking at a thousand epochs.
CREATE VIEW shardmove_catalog.current_routes AS
    SELECT epoch, keyspace, lower, upper, shard, move_id, held FROM shardmove_catalog.route
    WHERE epoch = (SELECT epoch FROM shardmove_catalog.cluster);


-- Bounds in the key space's own order: bytes that compare as the keys do. An open end (NULL) stays NULL.
-- This and `overlap` have no settings of their own and are not strict, so that the planner writes them into the query
-- (a flip among 100 ranges: 138 ms without that); those who call them pin the search_path.
CREATE FUNCTION shardmove_catalog.sort_key(bound_type text, bound text) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT convert_to(
        CASE bound_type
            WHEN 'text' THEN bound
            WHEN 'uuid' THEN bound::uuid::text
            ELSE lpad((bound::bigint::numeric + 9223372036854775808)::text, 20, '0')
        END, 'UTF8')
$$;

-- Whether two half-open ranges share a key.
CREATE FUNCTION shardmove_catalog.overlap(bound_type text, lower_1 text, upper_1 text, lower_2 text, upper_2 text)
RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT coalesce(shardmove_catalog.sort_key(bound_type, lower_1)
                    < shardmove_catalog.sort_key(bound_type, upper_2), true)
       AND coalesce(shardmove_catalog.sort_key(bound_type, lower_2)
                    < shardmove_catalog.sort_key(bound_type, upper_1), true)
$$;


-- I7: what is wrong with an epoch; no row where each known keyspace covers its key space exactly once.
CREATE FUNCTION shardmove_catalog.coverage_faults(the_epoch bigint) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH bounded AS (
        SELECT r.keyspace, r.lower, r.upper,
               shardmove_catalog.sort_key(k.bound_type, r.lower) AS low,
               shardmove_catalog.sort_key(k.bound_type, r.upper) AS high
        FROM shardmove_catalog.route r JOIN shardmove_catalog.keyspace k ON k.name = r.keyspace
        WHERE r.epoch = the_epoch
    ), placed AS (
        SELECT *, row_number() OVER in_order = 1 AS is_first,
               row_number() OVER in_order = count(*) OVER (PARTITION BY keyspace) AS is_last,
               lag(high) OVER in_order AS edge
        FROM bounded WINDOW in_order AS (PARTITION BY keyspace ORDER BY low NULLS FIRST)
    )
    SELECT format('the routes of %s leave a gap or overlap at the range %s:%s', keyspace, lower, upper) FROM placed
    WHERE is_first <> (low IS NULL) OR is_last <> (high IS NULL) OR low >= high
       OR (NOT is_first AND low IS DISTINCT FROM edge)
    UNION ALL
    SELECT format('the keyspace %s has no routes', k.name) FROM shardmove_catalog.keyspace k
    WHERE NOT EXISTS (SELECT FROM shardmove_catalog.route r WHERE r.epoch = the_epoch AND r.keyspace = k.name)
    UNION ALL
    SELECT format('there is no keyspace %s', r.keyspace) FROM shardmove_catalog.route r
    WHERE r.epoch = the_epoch AND NOT EXISTS (SELECT FROM shardmove_catalog.keyspace k WHERE k.name = r.keyspace)
    UNION ALL
    SELECT format('there is no shard %s', r.shard) FROM shardmove_catalog.route r
    WHERE r.epoch = the_epoch AND NOT EXISTS (SELECT FROM shardmove_catalog.shard s WHERE s.name = r.shard)
$$;

-- Runs at commit, for an epoch that was made and for a keyspace that came or went. The lock on the cluster's row makes
-- it see every publisher before it; under a snapshot that is too old that lock itself is a serialization failure.
CREATE FUNCTION shardmove_catalog.check_coverage() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    newest bigint;
    fault text;
BEGIN
    SELECT epoch INTO newest FROM shardmove_catalog.cluster FOR NO KEY UPDATE;
    IF TG_TABLE_NAME = 'route_epoch' THEN
        PERFORM FROM shardmove_catalog.route_epoch WHERE epoch = NEW.epoch AND ranges = NEW.ranges;
        IF NOT FOUND THEN
            RETURN NULL; -- changed again since: the event of that change checks it
        ELSIF NEW.epoch IS DISTINCT FROM newest THEN
            RAISE EXCEPTION 'epoch % is published but not the newest (%)', NEW.epoch, newest USING ERRCODE = 'SM006';
        END IF;
    END IF;
    PERFORM FROM shardmove_catalog.shard
    WHERE name IN (SELECT shard FROM shardmove_catalog.route WHERE epoch = newest) ORDER BY name FOR KEY SHARE;
    SELECT * INTO fault FROM shardmove_catalog.coverage_faults(newest) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'epoch % cannot be published: %', newest, fault USING ERRCODE = 'SM006';
    END IF;
    RETURN NULL;
END $$;

CREATE CONSTRAINT TRIGGER epoch_covers AFTER INSERT OR UPDATE ON shardmove_catalog.route_epoch
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.check_coverage();
CREATE CONSTRAINT TRIGGER keyspace_is_covered AFTER INSERT OR DELETE ON shardmove_catalog.keyspace
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.check_coverage();

CREATE FUNCTION shardmove_catalog.count_ranges() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmove_catalog.route_epoch e
    SET ranges = e.ranges + CASE TG_OP WHEN 'INSERT' THEN c.ranges ELSE -c.ranges END
    FROM (SELECT epoch, count(*) AS ranges FROM changed GROUP BY epoch) c WHERE e.epoch = c.epoch;
    RETURN NULL;
END $$;

CREATE TRIGGER ranges_added AFTER INSERT ON shardmove_catalog.route
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.count_ranges();
-- An epoch that is pruned takes its ranges with it: then there is nothing left to count them in.
CREATE TRIGGER ranges_removed AFTER DELETE ON shardmove_catalog.route
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.count_ranges();

CREATE FUNCTION shardmove_catalog.guard_epoch() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.made_by := pg_current_xact_id();
    ELSIF OLD.made_by <> pg_current_xact_id()
       OR (NEW.epoch, NEW.published_at, NEW.reason, NEW.made_by)
          IS DISTINCT FROM (OLD.epoch, OLD.published_at, OLD.reason, OLD.made_by) THEN
        RAISE EXCEPTION 'epoch % is published: it cannot be changed', OLD.epoch USING ERRCODE = 'SM006';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE INSERT OR UPDATE ON shardmove_catalog.route_epoch
    FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_epoch();

CREATE FUNCTION shardmove_catalog.refuse() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% of % is not allowed', TG_OP, TG_TABLE_NAME USING ERRCODE = 'SM006';
END $$;
CREATE TRIGGER immutable BEFORE UPDATE OR TRUNCATE ON shardmove_catalog.route
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();
CREATE TRIGGER kept BEFORE TRUNCATE ON shardmove_catalog.route_epoch
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON shardmove_catalog.cluster
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON shardmove_catalog.attempt
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON shardmove_catalog.move
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();
CREATE TRIGGER immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON shardmove_catalog.move_range
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();
CREATE TRIGGER kept BEFORE TRUNCATE ON shardmove_catalog.shard
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();
CREATE TRIGGER kept BEFORE TRUNCATE ON shardmove_catalog.keyspace
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE FUNCTION shardmove_catalog.guard_cluster() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NEW.id <> OLD.id OR NEW.epoch <> OLD.epoch + 1 THEN
        RAISE EXCEPTION 'the cluster keeps its id, and its epoch rises by one' USING ERRCODE = 'SM006';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE UPDATE ON shardmove_catalog.cluster
    FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_cluster();

-- A keyspace's shape is what its ranges and its moves were made for.
CREATE FUNCTION shardmove_catalog.guard_keyspace() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (NEW.name, NEW.key_type, NEW.scheme) IS DISTINCT FROM (OLD.name, OLD.key_type, OLD.scheme) THEN
        RAISE EXCEPTION 'the keyspace % cannot change its name, key type or scheme', OLD.name
            USING ERRCODE = 'SM006', HINT = 'make a new keyspace';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE UPDATE ON shardmove_catalog.keyspace
    FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_keyspace();

-- A shard that owns a range, or that an unfinished move needs, cannot be dropped.
CREATE FUNCTION shardmove_catalog.guard_shard() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    needed_by text;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.name = OLD.name THEN
        RETURN NEW;
    END IF;
    PERFORM FROM shardmove_catalog.cluster FOR NO KEY UPDATE;
    SELECT format('it owns the range %s:%s of %s', lower, upper, keyspace) INTO needed_by
    FROM shardmove_catalog.current_routes WHERE shard = OLD.name LIMIT 1;
    IF NOT FOUND THEN
        SELECT format('the move %s is unfinished', id) INTO needed_by
        FROM shardmove_catalog.move WHERE NOT is_finished AND OLD.name IN (source, target) LIMIT 1;
    END IF;
    IF FOUND THEN
        RAISE EXCEPTION 'the shard % cannot be dropped: %', OLD.name, needed_by
            USING ERRCODE = 'SM006', HINT = 'empty it with `shardmove plan drain`, and finish the plan';
    END IF;
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END $$;
CREATE TRIGGER guard BEFORE UPDATE OR DELETE ON shardmove_catalog.shard
    FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_shard();

CREATE FUNCTION shardmove_catalog.guard_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        PERFORM FROM shardmove_catalog.shard WHERE name IN (NEW.source, NEW.target) ORDER BY name FOR KEY SHARE;
        IF (SELECT count(*) FROM shardmove_catalog.shard WHERE name IN (NEW.source, NEW.target)) <> 2 THEN
            RAISE EXCEPTION 'there is no shard % or no shard %', NEW.source, NEW.target USING ERRCODE = 'SM005';
        END IF;
    ELSIF (NEW.id, NEW.plan_id, NEW.ordinal, NEW.keyspace, NEW.source, NEW.target)
          IS DISTINCT FROM (OLD.id, OLD.plan_id, OLD.ordinal, OLD.keyspace, OLD.source, OLD.target)
       OR NEW.lease_number < OLD.lease_number OR NEW.last_attempt < OLD.last_attempt
       OR (OLD.is_finished AND NEW.state <> OLD.state) THEN
        RAISE EXCEPTION 'the move % keeps what it carries and its final state; its numbers only rise', OLD.id
            USING ERRCODE = 'SM006';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE INSERT OR UPDATE ON shardmove_catalog.move
    FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_move();

-- A range is in one unfinished move at most. The keyspace's row is the lock; only READ COMMITTED sees, after waiting
-- for it, what the one before it did.
CREATE FUNCTION shardmove_catalog.guard_move_range() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    the_keyspace shardmove_catalog.keyspace;
    other record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'moves are made in READ COMMITTED transactions only' USING ERRCODE = 'SM006';
    END IF;
    SELECT k.* INTO the_keyspace FROM shardmove_catalog.keyspace k JOIN shardmove_catalog.move m ON m.keyspace = k.name
    WHERE m.id = NEW.move_id FOR NO KEY UPDATE OF k;
    SELECT m.id, r.lower, r.upper INTO other
    FROM shardmove_catalog.move m JOIN shardmove_catalog.move_range r ON r.move_id = m.id
    WHERE m.keyspace = the_keyspace.name AND NOT m.is_finished
      AND shardmove_catalog.overlap(the_keyspace.bound_type, r.lower, r.upper, NEW.lower, NEW.upper) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the range %:% of % overlaps %:% of the unfinished move %',
            coalesce(NEW.lower, ''), coalesce(NEW.upper, ''), the_keyspace.name,
            coalesce(other.lower, ''), coalesce(other.upper, ''), other.id
            USING ERRCODE = 'SM006', HINT = format('complete or roll back %s first', other.id);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE INSERT ON shardmove_catalog.move_range
    FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_move_range();

-- An attempt is decided once.
CREATE FUNCTION shardmove_catalog.guard_attempt() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (OLD.outcome <> 'open' AND (NEW.outcome, NEW.decided_at) IS DISTINCT FROM (OLD.outcome, OLD.decided_at))
       OR (NEW.move_id, NEW.number, NEW.direction, NEW.lease_number)
          IS DISTINCT FROM (OLD.move_id, OLD.number, OLD.direction, OLD.lease_number) THEN
        RAISE EXCEPTION 'attempt % of move % is %', OLD.number, OLD.move_id, OLD.outcome USING ERRCODE = 'SM003';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER guard BEFORE UPDATE ON shardmove_catalog.attempt
    FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_attempt();

-- A catalog starts with epoch 0: no keyspaces, no routes.
INSERT INTO shardmove_catalog.route_epoch (epoch, reason) VALUES (0, 'the catalog was created');
INSERT INTO shardmove_catalog.cluster (epoch) VALUES (0);
