-- Hook 1, second half: what shardmove calls. One call is one message and one transaction.
-- Each takes its locks by conditional writes or FOR NO KEY UPDATE before it believes anything: in READ COMMITTED both
-- see the row as it is once the lock is theirs, so a holder that was overtaken while it waited changes nothing.

-- Adds an event. The lock makes ids ascend in the order of the commits: a reader that goes on after an id misses none.
CREATE FUNCTION shardmove_catalog.add_event(the_kind text, the_move text, the_plan text, the_detail jsonb)
RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    made bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('shardmove_catalog.event', 0));
    INSERT INTO shardmove_catalog.event (kind, move_id, plan_id, detail)
    VALUES (the_kind, the_move,
            coalesce(the_plan, (SELECT plan_id FROM shardmove_catalog.move WHERE id = the_move)), the_detail)
    RETURNING id INTO made;
    PERFORM pg_notify('shardmove_events', made::text);
    RETURN made;
END $$;

-- Publishes the epoch after `base`: the keyspaces in the_routes anew, all others as they were. SM002 where the newest
-- epoch is not `base`. The last 1,000 epochs are kept.
CREATE FUNCTION shardmove_catalog.publish(base bigint, the_reason text, the_routes jsonb)
RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmove_catalog.cluster SET epoch = base + 1 WHERE epoch = base;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the route table moved on: its epoch is not % any more', base USING ERRCODE = 'SM002';
    END IF;
    INSERT INTO shardmove_catalog.route_epoch (epoch, reason) VALUES (base + 1, the_reason);
    INSERT INTO shardmove_catalog.route (epoch, keyspace, lower, upper, shard, move_id, held)
    SELECT base + 1, n.keyspace, n.lower, n.upper, n.shard, n.move_id, n.held
    FROM jsonb_to_recordset(the_routes)
         AS n(keyspace text, lower text, upper text, shard text, move_id text, held boolean)
    UNION ALL
    SELECT base + 1, o.keyspace, o.lower, o.upper, o.shard, o.move_id, o.held
    FROM shardmove_catalog.route o JOIN shardmove_catalog.keyspace k ON k.name = o.keyspace
    WHERE o.epoch = base AND o.keyspace NOT IN (SELECT n ->> 'keyspace' FROM jsonb_array_elements(the_routes) n);
    DELETE FROM shardmove_catalog.route_epoch WHERE epoch <= base + 1 - 1000;
    PERFORM pg_notify('shardmove_routes', (base + 1)::text);
    RETURN base + 1;
END $$;

-- SM006 unless the newest epoch gives every key of the move to the shard.
CREATE FUNCTION shardmove_catalog.require_owner(the_move text, the_shard text)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    the_keyspace shardmove_catalog.keyspace;
    other record;
BEGIN
    SELECT k.* INTO the_keyspace FROM shardmove_catalog.move m JOIN shardmove_catalog.keyspace k ON k.name = m.keyspace
    WHERE m.id = the_move;
    SELECT c.keyspace, c.lower, c.upper, c.shard INTO other
    FROM shardmove_catalog.current_routes c, shardmove_catalog.move_range r
    WHERE r.move_id = the_move AND c.keyspace = the_keyspace.name AND c.shard <> the_shard
      AND shardmove_catalog.overlap(the_keyspace.bound_type, r.lower, r.upper, c.lower, c.upper) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the range %:% of % belongs to %, not to %', coalesce(other.lower, ''),
            coalesce(other.upper, ''), other.keyspace, other.shard, the_shard USING ERRCODE = 'SM006';
    END IF;
END $$;

CREATE FUNCTION shardmove_catalog.create_plan(the_kind text, the_description text, the_moves jsonb)
RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    the_plan text;
    the_move text;
    each record;
BEGIN
    PERFORM FROM shardmove_catalog.cluster FOR SHARE;
    PERFORM FROM shardmove_catalog.keyspace
    WHERE name IN (SELECT n ->> 'keyspace' FROM jsonb_array_elements(the_moves) n) ORDER BY name FOR NO KEY UPDATE;
    INSERT INTO shardmove_catalog.plan (kind, description) VALUES (the_kind, the_description)
    RETURNING id INTO the_plan;
    FOR each IN SELECT n.value, n.ordinality FROM jsonb_array_elements(the_moves) WITH ORDINALITY n LOOP
        IF NOT EXISTS (SELECT FROM shardmove_catalog.keyspace WHERE name = each.value ->> 'keyspace') THEN
            RAISE EXCEPTION 'there is no keyspace %', each.value ->> 'keyspace' USING ERRCODE = 'SM005';
        END IF;
        INSERT INTO shardmove_catalog.move (plan_id, ordinal, keyspace, source, target)
        VALUES (the_plan, each.ordinality, each.value ->> 'keyspace', each.value ->> 'source', each.value ->> 'target')
        RETURNING id INTO the_move;
        INSERT INTO shardmove_catalog.move_range (move_id, lower, upper)
        SELECT the_move, r ->> 0, r ->> 1 FROM jsonb_array_elements(each.value -> 'ranges') r;
        PERFORM shardmove_catalog.require_owner(the_move, each.value ->> 'source');
    END LOOP;
    PERFORM shardmove_catalog.add_event('plan_created', NULL, the_plan, jsonb_build_object('kind', the_kind));
    RETURN the_plan;
END $$;

-- Locks the move's row for the holder of the lease. SM001 where the number moved on, SM005 where there is no such move.
CREATE FUNCTION shardmove_catalog.lock_move(the_move text, the_lease bigint)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    newest bigint;
BEGIN
    SELECT lease_number INTO newest FROM shardmove_catalog.move WHERE id = the_move FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no move %', the_move USING ERRCODE = 'SM005';
    ELSIF newest <> the_lease THEN
        RAISE EXCEPTION 'move %: lease % is lost, its number is % now', the_move, the_lease, newest
            USING ERRCODE = 'SM001', HINT = 'another coordinator holds the move; this one is done';
    END IF;
END $$;

-- The state and its event. The caller locked the move. SM004 where the move is in neither state; false where it was in
-- `after` already.
CREATE FUNCTION shardmove_catalog.enter_state(the_move text, before text, after text, detail jsonb)
RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    present text;
BEGIN
    UPDATE shardmove_catalog.move
    SET state = after, state_since = clock_timestamp(), error = NULL,
        finished_at = CASE WHEN after IN ('completed', 'rolled_back') THEN clock_timestamp() END
    WHERE id = the_move AND state = before;
    IF FOUND THEN
        PERFORM shardmove_catalog.add_event('state_changed', the_move, NULL,
            jsonb_build_object('before', before, 'after', after) || detail);
        RETURN true;
    END IF;
    SELECT state INTO present FROM shardmove_catalog.move WHERE id = the_move;
    IF present <> after THEN
        RAISE EXCEPTION 'move % is %, not %: it cannot become %', the_move, present, before, after
            USING ERRCODE = 'SM004';
    END IF;
    RETURN false;
END $$;

-- A state change that is no cutover, with a new epoch where the_routes is given. True where it changed anything.
CREATE FUNCTION shardmove_catalog.transition(
    the_move text, the_lease bigint, before text, after text, detail jsonb, base bigint, the_routes jsonb)
RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    undecided bigint;
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    SELECT number INTO undecided FROM shardmove_catalog.attempt WHERE move_id = the_move AND outcome = 'open';
    IF FOUND THEN
        RAISE EXCEPTION 'move % cannot become %: its attempt % is open', the_move, after, undecided
            USING ERRCODE = 'SM006', HINT = 'settle the attempt first';
    ELSIF the_routes IS NOT NULL AND (SELECT state FROM shardmove_catalog.move WHERE id = the_move) = before THEN
        PERFORM shardmove_catalog.publish(base, format('move %s became %s', the_move, after), the_routes);
    END IF;
    RETURN shardmove_catalog.enter_state(the_move, before, after, detail);
END $$;

-- The next attempt of the move, its range held. Returns its number.
CREATE FUNCTION shardmove_catalog.open_attempt(
    the_move text, the_lease bigint, the_direction text, base bigint, the_routes jsonb)
RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    needed text := CASE the_direction WHEN 'forward' THEN 'ready' ELSE 'switched' END;
    present text;
    made bigint;
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    SELECT state INTO present FROM shardmove_catalog.move WHERE id = the_move;
    IF present <> needed THEN
        RAISE EXCEPTION 'move % is %: an attempt to go % begins in %', the_move, present, the_direction, needed
            USING ERRCODE = 'SM004';
    ELSIF EXISTS (SELECT FROM shardmove_catalog.attempt WHERE move_id = the_move AND outcome = 'open') THEN
        RAISE EXCEPTION 'move % has an open attempt already', the_move
            USING ERRCODE = 'SM006', HINT = 'settle that attempt first';
    END IF;
    UPDATE shardmove_catalog.move SET last_attempt = last_attempt + 1 WHERE id = the_move
    RETURNING last_attempt INTO made;
    INSERT INTO shardmove_catalog.attempt (move_id, number, direction, lease_number)
    VALUES (the_move, made, the_direction, the_lease);
    PERFORM shardmove_catalog.publish(base, format('attempt %s of move %s opened', made, the_move), the_routes);
    PERFORM shardmove_catalog.add_event('attempt_opened', the_move, NULL,
        jsonb_build_object('attempt', made, 'direction', the_direction));
    RETURN made;
END $$;

-- The cutover itself. Its conditions, in this order: the lease, the attempt open and opened under that lease, the
-- epoch, the state, the new owner. Returns the epoch that it published.
CREATE FUNCTION shardmove_catalog.flip(
    the_move text, the_number bigint, the_lease bigint, before text, after text, detail jsonb, base bigint,
    the_routes jsonb)
RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    decided shardmove_catalog.attempt;
    published bigint;
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    UPDATE shardmove_catalog.attempt SET outcome = 'flipped', decided_at = clock_timestamp()
    WHERE move_id = the_move AND number = the_number AND outcome = 'open' AND lease_number = the_lease
    RETURNING * INTO decided;
    IF NOT FOUND THEN
        PERFORM shardmove_catalog.explain_attempt(the_move, the_number);
    END IF;
    published := shardmove_catalog.publish(
        base, format('attempt %s of move %s flipped', the_number, the_move), the_routes);
    PERFORM shardmove_catalog.add_event('attempt_flipped', the_move, NULL,
        jsonb_build_object('attempt', the_number, 'direction', decided.direction, 'epoch', published));
    IF NOT shardmove_catalog.enter_state(
        the_move, before, after, detail || jsonb_build_object('attempt', the_number)) THEN
        RAISE EXCEPTION 'move % is % already', the_move, after USING ERRCODE = 'SM004';
    END IF;
    PERFORM shardmove_catalog.require_owner(the_move, CASE decided.direction WHEN 'forward' THEN target ELSE source END)
    FROM shardmove_catalog.move WHERE id = the_move;
    RETURN published;
END $$;

-- Why an attempt could not be decided. Never returns.
CREATE FUNCTION shardmove_catalog.explain_attempt(the_move text, the_number bigint)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    found_one shardmove_catalog.attempt;
BEGIN
    SELECT * INTO found_one FROM shardmove_catalog.attempt WHERE move_id = the_move AND number = the_number;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'move % has no attempt %', the_move, the_number USING ERRCODE = 'SM005';
    ELSIF found_one.outcome = 'open' THEN
        RAISE EXCEPTION 'attempt % of move % was opened under lease %: nobody else continues it',
            the_number, the_move, found_one.lease_number
            USING ERRCODE = 'SM006', HINT = 'abandon it and open another one';
    END IF;
    RAISE EXCEPTION 'attempt % of move % is % already', the_number, the_move, found_one.outcome
        USING ERRCODE = 'SM003';
END $$;

-- Gives an attempt up, if it is open still, and publishes the_routes with it. The lock on its row waits for a flip that
-- is committing. Returns how the attempt stands now; anyone may call it.
CREATE FUNCTION shardmove_catalog.abandon(
    the_move text, the_number bigint, the_reason text, base bigint, the_routes jsonb)
RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    present text;
BEGIN
    UPDATE shardmove_catalog.attempt
    SET outcome = 'abandoned', decided_at = clock_timestamp(), reason = the_reason
    WHERE move_id = the_move AND number = the_number AND outcome = 'open';
    IF FOUND THEN
        PERFORM shardmove_catalog.publish(
            base, format('attempt %s of move %s abandoned', the_number, the_move), the_routes);
        PERFORM shardmove_catalog.add_event('attempt_abandoned', the_move, NULL,
            jsonb_build_object('attempt', the_number, 'reason', the_reason));
        RETURN 'abandoned';
    END IF;
    SELECT outcome INTO present FROM shardmove_catalog.attempt WHERE move_id = the_move AND number = the_number;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'move % has no attempt %', the_move, the_number USING ERRCODE = 'SM005';
    END IF;
    RETURN present;
END $$;

-- Takes the move's lease for this session, which must be the lease's own: the session's advisory lock is its life.
-- No row where another session has the lock.
CREATE FUNCTION shardmove_catalog.take_lease(the_move text, the_holder text, the_host text, the_process integer)
RETURNS SETOF bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    taken bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM shardmove_catalog.move WHERE id = the_move) THEN
        RAISE EXCEPTION 'there is no move %', the_move USING ERRCODE = 'SM005';
    ELSIF NOT pg_try_advisory_lock(hashtextextended('shardmove_catalog.lease.' || the_move, 0)) THEN
        RETURN;
    END IF;
    UPDATE shardmove_catalog.move SET lease_number = lease_number + 1 WHERE id = the_move
    RETURNING lease_number INTO taken;
    DELETE FROM shardmove_catalog.lease WHERE move_id = the_move;
    INSERT INTO shardmove_catalog.lease
    SELECT the_move, taken, the_holder, the_host, the_process, pid, backend_start, clock_timestamp(), clock_timestamp()
    FROM pg_stat_activity WHERE pid = pg_backend_pid();
    RETURN NEXT taken;
END $$;

CREATE FUNCTION shardmove_catalog.beat(the_move text, the_lease bigint)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmove_catalog.lease SET beat_at = clock_timestamp() WHERE move_id = the_move AND number = the_lease;
    IF NOT FOUND THEN
        PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    END IF;
END $$;

CREATE FUNCTION shardmove_catalog.set_paused(the_move text, whether boolean)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE shardmove_catalog.move SET paused = whether WHERE id = the_move AND paused <> whether;
    IF FOUND THEN
        PERFORM shardmove_catalog.add_event(CASE WHEN whether THEN 'paused' ELSE 'resumed' END, the_move, NULL, '{}');
    ELSIF NOT EXISTS (SELECT FROM shardmove_catalog.move WHERE id = the_move) THEN
        RAISE EXCEPTION 'there is no move %', the_move USING ERRCODE = 'SM005';
    END IF;
END $$;

CREATE FUNCTION shardmove_catalog.set_error(the_move text, the_lease bigint, the_error text)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    UPDATE shardmove_catalog.move SET error = the_error WHERE id = the_move AND error IS DISTINCT FROM the_error;
    IF FOUND AND the_error IS NOT NULL THEN
        PERFORM shardmove_catalog.add_event('error', the_move, NULL, jsonb_build_object('error', the_error));
    END IF;
END $$;

CREATE FUNCTION shardmove_catalog.set_identities(the_move text, the_lease bigint, the_identities jsonb)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    UPDATE shardmove_catalog.move SET identities = the_identities WHERE id = the_move;
END $$;

-- The counters named in the_stats; others keep their values.
CREATE FUNCTION shardmove_catalog.set_stats(the_move text, the_lease bigint, the_stats jsonb)
RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    UPDATE shardmove_catalog.move SET stats = stats || the_stats WHERE id = the_move;
END $$;
