-- Hook 3: routers that follow this catalog, and who gets the reads of a moving range (traffic phases).
-- Rows are locked in this order: move, attempt, cluster, traffic; a router's own row before that of traffic.

-- Routers that are alive, or were a while ago. `beat_at` is this server's clock. Whoever was silent for its own
-- `confirm_s` and a quarter more (clocks run apart) serves no moving range any more, and is not waited for: it has to
-- beat, and then to read, before it does again.
CREATE TABLE shardmove_catalog.router (
    id text PRIMARY KEY,
    name text NOT NULL,
    host text NOT NULL,
    process_id integer NOT NULL,
    confirm_s double precision NOT NULL CHECK (confirm_s > 0),
    acknowledged bigint NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    beat_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON COLUMN shardmove_catalog.router.acknowledged IS 'nothing there is decided by an older epoch any more';

-- The phase of a move that is `ready`; in every other state the state says it all, and a move without a row is in 2.
-- `number` rises with each change of the phase: what routers count belongs to one number. `reads_ended_epoch`: reads of
-- the target ended with that epoch, and somebody may not have heard of it yet; commits are mirrored first until then.
CREATE TABLE shardmove_catalog.traffic (
    move_id text PRIMARY KEY REFERENCES shardmove_catalog.move,
    number bigint NOT NULL DEFAULT 0,
    phase integer NOT NULL DEFAULT 2 CHECK (phase IN (2, 3, 4)),
    read_share double precision NOT NULL DEFAULT 0 CHECK (read_share BETWEEN 0 AND 1),
    sample_rate double precision NOT NULL DEFAULT 0 CHECK (sample_rate BETWEEN 0 AND 1),
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    reads_ended_epoch bigint,
    reads_ended_at timestamptz,
    compared bigint NOT NULL DEFAULT 0,
    differing bigint NOT NULL DEFAULT 0,
    passes bigint NOT NULL DEFAULT 0,
    failures bigint NOT NULL DEFAULT 0,
    CHECK (read_share = 0 OR phase = 4),
    CHECK ((reads_ended_epoch IS NULL) = (reads_ended_at IS NULL))
);

-- Reads whose two answers differed after the mirror had caught up. The newest 1,000 of a move are kept.
CREATE TABLE shardmove_catalog.difference (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    move_id text NOT NULL REFERENCES shardmove_catalog.move,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    router text NOT NULL,
    table_name text NOT NULL,
    key text NOT NULL,
    source_rows text NOT NULL,
    target_rows text NOT NULL
);
CREATE INDEX difference_move ON shardmove_catalog.difference (move_id, id);
COMMENT ON TABLE shardmove_catalog.difference IS 'values of rows: they are shown to nobody but who reads this table';

-- The phase of every move, as its state and its row say.
CREATE VIEW shardmove_catalog.current_phases AS
    SELECT m.id AS move_id,
           CASE WHEN m.state IN ('switched', 'cleaning', 'completed') THEN 5
                WHEN m.state = 'ready' THEN coalesce(t.phase, 2)
                WHEN m.state IN ('copying', 'verifying') THEN 2
                ELSE 1 END AS phase,
           coalesce(t.number, 0) AS number,
           coalesce(t.read_share, 0) AS read_share,
           coalesce(t.sample_rate, 0) AS sample_rate,
           CASE WHEN m.state = 'ready' THEN coalesce(t.since, m.state_since) ELSE m.state_since END AS since,
           t.reads_ended_epoch, t.reads_ended_at,
           coalesce(t.compared, 0) AS compared, coalesce(t.differing, 0) AS differing,
           coalesce(t.passes, 0) AS passes, coalesce(t.failures, 0) AS failures
    FROM shardmove_catalog.move m LEFT JOIN shardmove_catalog.traffic t ON t.move_id = m.id;

-- Routers that may act by an epoch before this one: alive, and they have not acknowledged it.
CREATE FUNCTION shardmove_catalog.late_routers(the_epoch bigint) RETURNS SETOF shardmove_catalog.router
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT * FROM shardmove_catalog.router
    WHERE acknowledged < the_epoch AND beat_at > clock_timestamp() - make_interval(secs => confirm_s * 1.25)
$$;

-- A router lives. What it acknowledged of a catalog that has lost its tail since is nothing that this one published.
-- Routers that were silent for ten minutes are forgotten.
CREATE FUNCTION shardmove_catalog.beat_router(
    the_id text, the_name text, the_host text, the_process integer, the_confirm_s double precision, the_epoch bigint)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO shardmove_catalog.router AS r (id, name, host, process_id, confirm_s, acknowledged)
    SELECT the_id, the_name, the_host, the_process, the_confirm_s, least(the_epoch, epoch)
    FROM shardmove_catalog.cluster
    ON CONFLICT (id) DO UPDATE
    SET confirm_s = the_confirm_s, acknowledged = greatest(r.acknowledged, excluded.acknowledged),
        beat_at = clock_timestamp();
    DELETE FROM shardmove_catalog.router WHERE id IN (
        SELECT id FROM shardmove_catalog.router WHERE beat_at < clock_timestamp() - interval '10 minutes'
        FOR UPDATE SKIP LOCKED);
    PERFORM shardmove_catalog.end_reads();
END $$;

-- A router acts by this epoch or a later one from now on. Not durable at once: an acknowledgement that a crash takes
-- back is waited for once more, and its next beat repeats it.
CREATE FUNCTION shardmove_catalog.acknowledge(the_id text, the_epoch bigint)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE shardmove_catalog.router SET acknowledged = the_epoch WHERE id = the_id AND acknowledged < the_epoch;
    IF FOUND THEN
        PERFORM pg_notify('shardmove_acknowledged', the_epoch::text);
        PERFORM shardmove_catalog.end_reads();
    END IF;
END $$;

-- Where every router that lives has heard that nobody reads the target any more, commits need not be mirrored first.
CREATE FUNCTION shardmove_catalog.end_reads()
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmove_catalog.traffic SET reads_ended_epoch = NULL, reads_ended_at = NULL
    WHERE reads_ended_epoch IS NOT NULL
      AND NOT EXISTS (SELECT FROM shardmove_catalog.late_routers(reads_ended_epoch));
    IF FOUND THEN
        PERFORM pg_notify('shardmove_routes', epoch::text) FROM shardmove_catalog.cluster;
    END IF;
END $$;

-- Another phase, or another share or sample in the same one, as a new epoch, which it returns. The caller locked the
-- row of cluster, then that of traffic, under its own condition: a flip locks them in this order.
CREATE FUNCTION shardmove_catalog.publish_phase(
    the_move text, after integer, the_share double precision, the_sample double precision, the_kind text,
    the_detail jsonb)
RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    before shardmove_catalog.traffic;
    base bigint;
    published bigint;
BEGIN
    SELECT * INTO before FROM shardmove_catalog.traffic WHERE move_id = the_move;
    SELECT epoch INTO base FROM shardmove_catalog.cluster;
    published := shardmove_catalog.publish(base, format('move %s: phase %s', the_move, after), '[]');
    UPDATE shardmove_catalog.traffic SET phase = after, read_share = the_share, sample_rate = the_sample
    WHERE move_id = the_move;
    IF before.phase <> after THEN
        UPDATE shardmove_catalog.traffic
        SET number = number + 1, since = clock_timestamp(), compared = 0, differing = 0, passes = 0, failures = 0
        WHERE move_id = the_move;
    END IF;
    IF before.phase = 4 AND before.read_share > 0 AND the_share = 0 THEN
        UPDATE shardmove_catalog.traffic SET reads_ended_epoch = published, reads_ended_at = clock_timestamp()
        WHERE move_id = the_move;
    END IF;
    PERFORM shardmove_catalog.add_event(the_kind, the_move, NULL, the_detail || jsonb_build_object(
        'before', before.phase, 'after', after, 'read_share', the_share, 'sample_rate', the_sample,
        'epoch', published));
    RETURN published;
END $$;

-- What the holder of the lease sets: from phase `before`. SM004 where the move is not ready, or in another phase.
CREATE FUNCTION shardmove_catalog.set_phase(
    the_move text, the_lease bigint, before integer, after integer, the_share double precision,
    the_sample double precision, the_detail jsonb)
RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    the_state text;
    present integer;
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    SELECT state INTO the_state FROM shardmove_catalog.move WHERE id = the_move;
    IF the_state <> 'ready' THEN
        RAISE EXCEPTION 'move % is %: its phase can be set while it is ready', the_move, the_state
            USING ERRCODE = 'SM004';
    ELSIF EXISTS (SELECT FROM shardmove_catalog.attempt WHERE move_id = the_move AND outcome = 'open') THEN
        RAISE EXCEPTION 'move % has an open cutover attempt', the_move
            USING ERRCODE = 'SM006', HINT = 'settle that attempt first';
    END IF;
    PERFORM FROM shardmove_catalog.cluster FOR NO KEY UPDATE;
    INSERT INTO shardmove_catalog.traffic (move_id) VALUES (the_move) ON CONFLICT (move_id) DO NOTHING;
    SELECT phase INTO present FROM shardmove_catalog.traffic WHERE move_id = the_move FOR NO KEY UPDATE;
    IF present <> before THEN
        RAISE EXCEPTION 'move % is in phase %, not %: somebody changed it', the_move, present, before
            USING ERRCODE = 'SM004';
    END IF;
    RETURN shardmove_catalog.publish_phase(the_move, after, the_share, the_sample, 'phase_changed', the_detail);
END $$;

-- Back from phase 4 to 3, for anybody whose reads the target does not answer; only in the phase that they were made in.
-- The epoch, or no row where somebody else changed the phase before.
CREATE FUNCTION shardmove_catalog.fall_back(the_move text, the_number bigint, the_router text, the_reason text)
RETURNS SETOF bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    the_sample double precision;
BEGIN
    PERFORM FROM shardmove_catalog.cluster FOR NO KEY UPDATE;
    SELECT sample_rate INTO the_sample FROM shardmove_catalog.traffic
    WHERE move_id = the_move AND number = the_number AND phase = 4 FOR NO KEY UPDATE;
    IF FOUND THEN
        RETURN NEXT shardmove_catalog.publish_phase(the_move, 3, 0, the_sample, 'phase_fell_back',
            jsonb_build_object('router', the_router, 'reason', the_reason));
    END IF;
END $$;

-- What a router counted since its last report; of another phase it does not count any more.
CREATE FUNCTION shardmove_catalog.report_traffic(
    the_move text, the_number bigint, more_compared bigint, more_differing bigint, more_passes bigint,
    more_failures bigint)
RETURNS void LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE shardmove_catalog.traffic
    SET compared = compared + more_compared, differing = differing + more_differing, passes = passes + more_passes,
        failures = failures + more_failures
    WHERE move_id = the_move AND number = the_number
$$;

CREATE FUNCTION shardmove_catalog.record_difference(
    the_move text, the_router text, the_table text, the_key text, the_source text, the_target text)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO shardmove_catalog.difference (move_id, router, table_name, key, source_rows, target_rows)
    VALUES (the_move, the_router, the_table, left(the_key, 1000), left(the_source, 100000), left(the_target, 100000));
    DELETE FROM shardmove_catalog.difference WHERE id IN (
        SELECT id FROM shardmove_catalog.difference WHERE move_id = the_move ORDER BY id DESC OFFSET 1000
        FOR UPDATE SKIP LOCKED);
END $$;

-- A move that leaves `ready` leaves its phase: when it is ready again nobody has heard of 3 or 4 yet. Where the
-- transaction publishes no epoch by itself, one is made, so that it can be acknowledged.
CREATE FUNCTION shardmove_catalog.reset_traffic() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    before shardmove_catalog.traffic;
    newest bigint;
BEGIN
    SELECT epoch INTO newest FROM shardmove_catalog.cluster FOR NO KEY UPDATE;
    SELECT * INTO before FROM shardmove_catalog.traffic WHERE move_id = NEW.id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF before.phase <> 2 AND NOT EXISTS (
        SELECT FROM shardmove_catalog.route_epoch WHERE epoch = newest AND made_by = pg_current_xact_id()) THEN
        newest := shardmove_catalog.publish(newest, format('move %s became %s', NEW.id, NEW.state), '[]');
    END IF;
    UPDATE shardmove_catalog.traffic
    SET number = number + 1, phase = 2, read_share = 0, sample_rate = 0, since = clock_timestamp(), compared = 0,
        differing = 0, passes = 0, failures = 0
    WHERE move_id = NEW.id;
    IF NEW.state <> 'verifying' THEN
        UPDATE shardmove_catalog.traffic SET reads_ended_epoch = NULL, reads_ended_at = NULL WHERE move_id = NEW.id;
    ELSIF before.read_share > 0 THEN
        UPDATE shardmove_catalog.traffic SET reads_ended_epoch = newest, reads_ended_at = clock_timestamp()
        WHERE move_id = NEW.id;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER leaves_ready AFTER UPDATE OF state ON shardmove_catalog.move
    FOR EACH ROW WHEN (OLD.state = 'ready' AND NEW.state <> 'ready')
    EXECUTE FUNCTION shardmove_catalog.reset_traffic();
CREATE TRIGGER kept BEFORE TRUNCATE ON shardmove_catalog.traffic
    FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

-- A command that was stopped before this one may go on long after the move's end: a finished move is left as it is.
CREATE OR REPLACE FUNCTION shardmove_catalog.set_paused(the_move text, whether boolean)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmove_catalog.move SET paused = whether WHERE id = the_move AND paused <> whether AND NOT is_finished;
    IF FOUND THEN
        PERFORM shardmove_catalog.add_event(CASE WHEN whether THEN 'paused' ELSE 'resumed' END, the_move, NULL, '{}');
    ELSIF NOT EXISTS (SELECT FROM shardmove_catalog.move WHERE id = the_move) THEN
        RAISE EXCEPTION 'there is no move %', the_move USING ERRCODE = 'SM005';
    END IF;
END $$;
