CREATE SCHEMA shardmove_catalog;

CREATE FUNCTION shardmove_catalog.abandon(the_move text, the_number bigint, the_reason text, base bigint, the_routes jsonb) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.add_event(the_kind text, the_move text, the_plan text, the_detail jsonb) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.beat(the_move text, the_lease bigint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE shardmove_catalog.lease SET beat_at = clock_timestamp() WHERE move_id = the_move AND number = the_lease;
    IF NOT FOUND THEN
        PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    END IF;
END $$;

CREATE FUNCTION shardmove_catalog.check_coverage() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.count_ranges() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE shardmove_catalog.route_epoch e
    SET ranges = e.ranges + CASE TG_OP WHEN 'INSERT' THEN c.ranges ELSE -c.ranges END
    FROM (SELECT epoch, count(*) AS ranges FROM changed GROUP BY epoch) c WHERE e.epoch = c.epoch;
    RETURN NULL;
END $$;

CREATE FUNCTION shardmove_catalog.coverage_faults(the_epoch bigint) RETURNS SETOF text
    LANGUAGE sql STABLE
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.create_plan(the_kind text, the_description text, the_moves jsonb) RETURNS text
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.enter_state(the_move text, before text, after text, detail jsonb) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.explain_attempt(the_move text, the_number bigint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.flip(the_move text, the_number bigint, the_lease bigint, before text, after text, detail jsonb, base bigint, the_routes jsonb) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.guard_attempt() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF (OLD.outcome <> 'open' AND (NEW.outcome, NEW.decided_at) IS DISTINCT FROM (OLD.outcome, OLD.decided_at))
       OR (NEW.move_id, NEW.number, NEW.direction, NEW.lease_number)
          IS DISTINCT FROM (OLD.move_id, OLD.number, OLD.direction, OLD.lease_number) THEN
        RAISE EXCEPTION 'attempt % of move % is %', OLD.number, OLD.move_id, OLD.outcome USING ERRCODE = 'SM003';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION shardmove_catalog.guard_cluster() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF NEW.id <> OLD.id OR NEW.epoch <> OLD.epoch + 1 THEN
        RAISE EXCEPTION 'the cluster keeps its id, and its epoch rises by one' USING ERRCODE = 'SM006';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION shardmove_catalog.guard_epoch() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.guard_keyspace() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    IF (NEW.name, NEW.key_type, NEW.scheme) IS DISTINCT FROM (OLD.name, OLD.key_type, OLD.scheme) THEN
        RAISE EXCEPTION 'the keyspace % cannot change its name, key type or scheme', OLD.name
            USING ERRCODE = 'SM006', HINT = 'make a new keyspace';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION shardmove_catalog.guard_move() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.guard_move_range() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.guard_shard() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.lock_move(the_move text, the_lease bigint) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.open_attempt(the_move text, the_lease bigint, the_direction text, base bigint, the_routes jsonb) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.overlap(bound_type text, lower_1 text, upper_1 text, lower_2 text, upper_2 text) RETURNS boolean
    LANGUAGE sql STABLE
    AS $$
    SELECT coalesce(shardmove_catalog.sort_key(bound_type, lower_1)
                    < shardmove_catalog.sort_key(bound_type, upper_2), true)
       AND coalesce(shardmove_catalog.sort_key(bound_type, lower_2)
                    < shardmove_catalog.sort_key(bound_type, upper_1), true)
$$;

CREATE FUNCTION shardmove_catalog.publish(base bigint, the_reason text, the_routes jsonb) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.refuse() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    RAISE EXCEPTION '% of % is not allowed', TG_OP, TG_TABLE_NAME USING ERRCODE = 'SM006';
END $$;

CREATE FUNCTION shardmove_catalog.require_owner(the_move text, the_shard text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.set_error(the_move text, the_lease bigint, the_error text) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    UPDATE shardmove_catalog.move SET error = the_error WHERE id = the_move AND error IS DISTINCT FROM the_error;
    IF FOUND AND the_error IS NOT NULL THEN
        PERFORM shardmove_catalog.add_event('error', the_move, NULL, jsonb_build_object('error', the_error));
    END IF;
END $$;

CREATE FUNCTION shardmove_catalog.set_identities(the_move text, the_lease bigint, the_identities jsonb) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    UPDATE shardmove_catalog.move SET identities = the_identities WHERE id = the_move;
END $$;

CREATE FUNCTION shardmove_catalog.set_paused(the_move text, whether boolean) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    UPDATE shardmove_catalog.move SET paused = whether WHERE id = the_move AND paused <> whether;
    IF FOUND THEN
        PERFORM shardmove_catalog.add_event(CASE WHEN whether THEN 'paused' ELSE 'resumed' END, the_move, NULL, '{}');
    ELSIF NOT EXISTS (SELECT FROM shardmove_catalog.move WHERE id = the_move) THEN
        RAISE EXCEPTION 'there is no move %', the_move USING ERRCODE = 'SM005';
    END IF;
END $$;

CREATE FUNCTION shardmove_catalog.set_stats(the_move text, the_lease bigint, the_stats jsonb) RETURNS void
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
BEGIN
    PERFORM shardmove_catalog.lock_move(the_move, the_lease);
    UPDATE shardmove_catalog.move SET stats = stats || the_stats WHERE id = the_move;
END $$;

CREATE FUNCTION shardmove_catalog.sort_key(bound_type text, bound text) RETURNS bytea
    LANGUAGE sql STABLE
    AS $$
    SELECT convert_to(
        CASE bound_type
            WHEN 'text' THEN bound
            WHEN 'uuid' THEN bound::uuid::text
            ELSE lpad((bound::bigint::numeric + 9223372036854775808)::text, 20, '0')
        END, 'UTF8')
$$;

CREATE FUNCTION shardmove_catalog.take_lease(the_move text, the_holder text, the_host text, the_process integer) RETURNS SETOF bigint
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE FUNCTION shardmove_catalog.transition(the_move text, the_lease bigint, before text, after text, detail jsonb, base bigint, the_routes jsonb) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $$
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

CREATE TABLE shardmove_catalog.attempt (
    move_id text NOT NULL,
    number bigint NOT NULL,
    direction text NOT NULL,
    outcome text DEFAULT 'open'::text NOT NULL,
    lease_number bigint NOT NULL,
    opened_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    decided_at timestamp with time zone,
    stall_ms double precision,
    reason text,
    CONSTRAINT attempt_check CHECK (((outcome = 'open'::text) = (decided_at IS NULL))),
    CONSTRAINT attempt_direction_check CHECK ((direction = ANY (ARRAY['forward'::text, 'back'::text]))),
    CONSTRAINT attempt_outcome_check CHECK ((outcome = ANY (ARRAY['open'::text, 'flipped'::text, 'abandoned'::text])))
);

CREATE TABLE shardmove_catalog.cluster (
    only_one boolean DEFAULT true NOT NULL,
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    epoch bigint NOT NULL,
    CONSTRAINT cluster_only_one_check CHECK (only_one)
);

CREATE TABLE shardmove_catalog.route (
    epoch bigint NOT NULL,
    keyspace text NOT NULL,
    lower text,
    upper text,
    shard text NOT NULL,
    move_id text,
    held boolean DEFAULT false NOT NULL
);

CREATE VIEW shardmove_catalog.current_routes AS
 SELECT epoch,
    keyspace,
    lower,
    upper,
    shard,
    move_id,
    held
   FROM shardmove_catalog.route
  WHERE (epoch = ( SELECT cluster.epoch
           FROM shardmove_catalog.cluster));

CREATE TABLE shardmove_catalog.event (
    id bigint NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    move_id text,
    plan_id text,
    kind text NOT NULL,
    detail jsonb DEFAULT '{}'::jsonb NOT NULL
);

ALTER TABLE shardmove_catalog.event ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME shardmove_catalog.event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);

CREATE TABLE shardmove_catalog.keyspace (
    name text NOT NULL,
    key_type text NOT NULL,
    scheme text NOT NULL,
    bound_type text GENERATED ALWAYS AS (
CASE scheme
    WHEN 'hash'::text THEN 'bigint'::text
    ELSE key_type
END) STORED NOT NULL,
    reference_tables text[] DEFAULT '{}'::text[] NOT NULL,
    CONSTRAINT keyspace_key_type_check CHECK ((key_type = ANY (ARRAY['smallint'::text, 'integer'::text, 'bigint'::text, 'text'::text, 'uuid'::text]))),
    CONSTRAINT keyspace_name_check CHECK ((name <> ''::text)),
    CONSTRAINT keyspace_scheme_check CHECK ((scheme = ANY (ARRAY['range'::text, 'hash'::text])))
);

CREATE TABLE shardmove_catalog.keyspace_table (
    keyspace text NOT NULL,
    table_name text NOT NULL,
    key_column text NOT NULL
);

CREATE TABLE shardmove_catalog.lease (
    move_id text NOT NULL,
    number bigint NOT NULL,
    holder text,
    host text NOT NULL,
    process_id integer NOT NULL,
    backend_pid integer NOT NULL,
    backend_start timestamp with time zone NOT NULL,
    acquired_at timestamp with time zone NOT NULL,
    beat_at timestamp with time zone NOT NULL
);

CREATE SEQUENCE shardmove_catalog.move_number
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

CREATE TABLE shardmove_catalog.move (
    id text DEFAULT ('m'::text || nextval('shardmove_catalog.move_number'::regclass)) NOT NULL,
    plan_id text NOT NULL,
    ordinal integer NOT NULL,
    keyspace text NOT NULL,
    source text NOT NULL,
    target text NOT NULL,
    state text DEFAULT 'pending'::text NOT NULL,
    state_since timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    lease_number bigint DEFAULT 0 NOT NULL,
    last_attempt bigint DEFAULT 0 NOT NULL,
    paused boolean DEFAULT false NOT NULL,
    error text,
    identities jsonb DEFAULT '{}'::jsonb NOT NULL,
    stats jsonb DEFAULT '{}'::jsonb NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    finished_at timestamp with time zone,
    is_finished boolean GENERATED ALWAYS AS ((state = ANY (ARRAY['completed'::text, 'rolled_back'::text]))) STORED NOT NULL,
    CONSTRAINT move_check CHECK ((source <> target)),
    CONSTRAINT move_state_check CHECK ((state = ANY (ARRAY['pending'::text, 'initializing'::text, 'copying'::text, 'verifying'::text, 'ready'::text, 'switched'::text, 'cleaning'::text, 'completed'::text, 'rolling_back'::text, 'rolled_back'::text])))
);

CREATE TABLE shardmove_catalog.move_range (
    move_id text NOT NULL,
    lower text,
    upper text
);

CREATE SEQUENCE shardmove_catalog.plan_number
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;

CREATE TABLE shardmove_catalog.plan (
    id text DEFAULT ('p'::text || nextval('shardmove_catalog.plan_number'::regclass)) NOT NULL,
    kind text NOT NULL,
    description text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

CREATE TABLE shardmove_catalog.route_epoch (
    epoch bigint NOT NULL,
    published_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    reason text NOT NULL,
    ranges integer DEFAULT 0 NOT NULL,
    made_by xid8 DEFAULT pg_current_xact_id() NOT NULL,
    CONSTRAINT route_epoch_epoch_check CHECK ((epoch >= 0))
);

CREATE TABLE shardmove_catalog.shard (
    name text NOT NULL,
    dsn text NOT NULL,
    CONSTRAINT shard_name_check CHECK ((name <> ''::text))
);

COMMENT ON COLUMN shardmove_catalog.shard.dsn IS 'without a password, always';

CREATE TABLE shardmove_catalog.upgrade_hook (
    number integer NOT NULL,
    release text NOT NULL,
    run_by text NOT NULL,
    run_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);

INSERT INTO shardmove_catalog.cluster VALUES
	(true, '95dfdf25-c270-4ebb-8136-e6660dc79799', 2);

INSERT INTO shardmove_catalog.event OVERRIDING SYSTEM VALUE VALUES
	(1, '2026-11-21 08:29:37.593616+00', NULL, NULL, 'applied', '{"changes": ["shard s1 added", "shard s2 added", "keyspace shop added", "keyspace shop: first routes published"]}'),
	(2, '2026-11-21 08:29:37.599678+00', NULL, 'p1', 'plan_created', '{"kind": "split"}'),
	(3, '2026-11-21 08:29:37.665248+00', 'm1', 'p1', 'state_changed', '{"after": "initializing", "before": "pending"}'),
	(4, '2026-11-21 08:29:37.746522+00', 'm1', 'p1', 'state_changed', '{"after": "copying", "before": "initializing"}');

INSERT INTO shardmove_catalog.keyspace VALUES
	('shop', 'bigint', 'range', DEFAULT, '{}');

INSERT INTO shardmove_catalog.keyspace_table VALUES
	('shop', 'customers', 'tenant_id'),
	('shop', 'orders', 'tenant_id');

INSERT INTO shardmove_catalog.lease VALUES
	('m1', 1, NULL, 'host', 4171, 4313, '2026-11-21 08:29:37.601512+00', '2026-11-21 08:29:37.608468+00', '2026-11-21 08:29:37.608468+00');

INSERT INTO shardmove_catalog.move VALUES
	('m1', 'p1', 1, 'shop', 's1', 's2', 'copying', '2026-11-21 08:29:37.746417+00', 1, 0, false, NULL, '{"s1": {"timeline": 1, "system_identifier": "7710539073481076845"}, "s2": {"timeline": 1, "system_identifier": "7710539073517580399"}, "(catalog)": {"timeline": 1, "system_identifier": "7710539073536471153"}}', '{}', '2026-11-21 08:29:37.597943+00', NULL, DEFAULT);

INSERT INTO shardmove_catalog.move_range VALUES
	('m1', '6', NULL);

INSERT INTO shardmove_catalog.plan VALUES
	('p1', 'split', 'split shop : of s1 at 6', '2026-11-21 08:29:37.59766+00');

INSERT INTO shardmove_catalog.route VALUES
	(1, 'shop', NULL, NULL, 's1', NULL, false),
	(2, 'shop', NULL, '6', 's1', NULL, false),
	(2, 'shop', '6', NULL, 's1', 'm1', false);

INSERT INTO shardmove_catalog.route_epoch VALUES
	(0, '2026-11-21 08:29:37.577262+00', 'the catalog was created', 0, '754'),
	(1, '2026-11-21 08:29:37.591109+00', 'configuration applied', 1, '755'),
	(2, '2026-11-21 08:29:37.745816+00', 'move m1 became copying', 2, '760');

INSERT INTO shardmove_catalog.shard VALUES
	('s1', 'dbname=shard'),
	('s2', 'dbname=shard');

INSERT INTO shardmove_catalog.upgrade_hook VALUES
	(1, '0.1.0', '0.1.0', '2026-11-21 08:29:37.579679+00');

SELECT pg_catalog.setval('shardmove_catalog.event_id_seq', 4, true);

SELECT pg_catalog.setval('shardmove_catalog.move_number', 1, true);

SELECT pg_catalog.setval('shardmove_catalog.plan_number', 1, true);

ALTER TABLE ONLY shardmove_catalog.attempt
    ADD CONSTRAINT attempt_pkey PRIMARY KEY (move_id, number);

ALTER TABLE ONLY shardmove_catalog.cluster
    ADD CONSTRAINT cluster_pkey PRIMARY KEY (only_one);

ALTER TABLE ONLY shardmove_catalog.event
    ADD CONSTRAINT event_pkey PRIMARY KEY (id);

ALTER TABLE ONLY shardmove_catalog.keyspace
    ADD CONSTRAINT keyspace_pkey PRIMARY KEY (name);

ALTER TABLE ONLY shardmove_catalog.keyspace_table
    ADD CONSTRAINT keyspace_table_pkey PRIMARY KEY (keyspace, table_name);

ALTER TABLE ONLY shardmove_catalog.lease
    ADD CONSTRAINT lease_pkey PRIMARY KEY (move_id);

ALTER TABLE ONLY shardmove_catalog.move
    ADD CONSTRAINT move_pkey PRIMARY KEY (id);

ALTER TABLE ONLY shardmove_catalog.move
    ADD CONSTRAINT move_plan_id_ordinal_key UNIQUE (plan_id, ordinal);

ALTER TABLE ONLY shardmove_catalog.plan
    ADD CONSTRAINT plan_pkey PRIMARY KEY (id);

ALTER TABLE ONLY shardmove_catalog.route_epoch
    ADD CONSTRAINT route_epoch_pkey PRIMARY KEY (epoch);

ALTER TABLE ONLY shardmove_catalog.shard
    ADD CONSTRAINT shard_pkey PRIMARY KEY (name);

ALTER TABLE ONLY shardmove_catalog.upgrade_hook
    ADD CONSTRAINT upgrade_hook_pkey PRIMARY KEY (number);

CREATE UNIQUE INDEX attempt_one_open ON shardmove_catalog.attempt USING btree (move_id) WHERE (outcome = 'open'::text);

CREATE INDEX event_move ON shardmove_catalog.event USING btree (move_id, id);

CREATE INDEX move_range_move ON shardmove_catalog.move_range USING btree (move_id);

CREATE INDEX move_unfinished ON shardmove_catalog.move USING btree (keyspace) WHERE (NOT is_finished);

CREATE INDEX route_epoch_keyspace ON shardmove_catalog.route USING btree (epoch, keyspace);

CREATE CONSTRAINT TRIGGER epoch_covers AFTER INSERT OR UPDATE ON shardmove_catalog.route_epoch DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.check_coverage();

CREATE TRIGGER guard BEFORE UPDATE ON shardmove_catalog.attempt FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_attempt();

CREATE TRIGGER guard BEFORE UPDATE ON shardmove_catalog.cluster FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_cluster();

CREATE TRIGGER guard BEFORE UPDATE ON shardmove_catalog.keyspace FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_keyspace();

CREATE TRIGGER guard BEFORE INSERT OR UPDATE ON shardmove_catalog.move FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_move();

CREATE TRIGGER guard BEFORE INSERT ON shardmove_catalog.move_range FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_move_range();

CREATE TRIGGER guard BEFORE INSERT OR UPDATE ON shardmove_catalog.route_epoch FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_epoch();

CREATE TRIGGER guard BEFORE DELETE OR UPDATE ON shardmove_catalog.shard FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.guard_shard();

CREATE TRIGGER immutable BEFORE DELETE OR UPDATE OR TRUNCATE ON shardmove_catalog.move_range FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE TRIGGER immutable BEFORE UPDATE OR TRUNCATE ON shardmove_catalog.route FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON shardmove_catalog.attempt FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON shardmove_catalog.cluster FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE TRIGGER kept BEFORE TRUNCATE ON shardmove_catalog.keyspace FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON shardmove_catalog.move FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE TRIGGER kept BEFORE TRUNCATE ON shardmove_catalog.route_epoch FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE TRIGGER kept BEFORE TRUNCATE ON shardmove_catalog.shard FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.refuse();

CREATE CONSTRAINT TRIGGER keyspace_is_covered AFTER INSERT OR DELETE ON shardmove_catalog.keyspace DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION shardmove_catalog.check_coverage();

CREATE TRIGGER ranges_added AFTER INSERT ON shardmove_catalog.route REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.count_ranges();

CREATE TRIGGER ranges_removed AFTER DELETE ON shardmove_catalog.route REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION shardmove_catalog.count_ranges();

ALTER TABLE ONLY shardmove_catalog.attempt
    ADD CONSTRAINT attempt_move_id_fkey FOREIGN KEY (move_id) REFERENCES shardmove_catalog.move(id);

ALTER TABLE ONLY shardmove_catalog.cluster
    ADD CONSTRAINT cluster_epoch_is_published FOREIGN KEY (epoch) REFERENCES shardmove_catalog.route_epoch(epoch) DEFERRABLE INITIALLY DEFERRED;

ALTER TABLE ONLY shardmove_catalog.keyspace_table
    ADD CONSTRAINT keyspace_table_keyspace_fkey FOREIGN KEY (keyspace) REFERENCES shardmove_catalog.keyspace(name) ON DELETE CASCADE;

ALTER TABLE ONLY shardmove_catalog.lease
    ADD CONSTRAINT lease_move_id_fkey FOREIGN KEY (move_id) REFERENCES shardmove_catalog.move(id);

ALTER TABLE ONLY shardmove_catalog.move
    ADD CONSTRAINT move_keyspace_fkey FOREIGN KEY (keyspace) REFERENCES shardmove_catalog.keyspace(name);

ALTER TABLE ONLY shardmove_catalog.move
    ADD CONSTRAINT move_plan_id_fkey FOREIGN KEY (plan_id) REFERENCES shardmove_catalog.plan(id);

ALTER TABLE ONLY shardmove_catalog.move_range
    ADD CONSTRAINT move_range_move_id_fkey FOREIGN KEY (move_id) REFERENCES shardmove_catalog.move(id);

ALTER TABLE ONLY shardmove_catalog.route
    ADD CONSTRAINT route_epoch_fkey FOREIGN KEY (epoch) REFERENCES shardmove_catalog.route_epoch(epoch) ON DELETE CASCADE;

ALTER TABLE ONLY shardmove_catalog.route
    ADD CONSTRAINT route_move_id_fkey FOREIGN KEY (move_id) REFERENCES shardmove_catalog.move(id);
