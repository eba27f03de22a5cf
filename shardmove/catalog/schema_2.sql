-- Hook 2: keys that are dates and times; keyspaces by hash reach those who read routes.
ALTER TABLE shardmove_catalog.keyspace DROP CONSTRAINT keyspace_key_type_check;
ALTER TABLE shardmove_catalog.keyspace ADD CONSTRAINT keyspace_key_type_check
    CHECK (key_type IN ('smallint', 'integer', 'bigint', 'text', 'uuid', 'date', 'timestamptz'));

-- Dates as days and times as microseconds since 2000, all numbers at an offset that makes them sort as texts.
CREATE OR REPLACE FUNCTION shardmove_catalog.sort_key(bound_type text, bound text) RETURNS bytea
LANGUAGE sql STABLE AS $$
    SELECT convert_to(
        CASE bound_type
            WHEN 'text' THEN bound
            WHEN 'uuid' THEN bound::uuid::text
            WHEN 'date' THEN lpad((bound::date - date '2000-01-01' + 9223372036854775808)::text, 20, '0')
            WHEN 'timestamptz' THEN
                lpad(trunc(extract(epoch FROM bound::timestamptz) * 1000000 + 9223372036854775808)::text, 20, '0')
            ELSE lpad((bound::bigint::numeric + 9223372036854775808)::text, 20, '0')
        END, 'UTF8')
$$;

-- Who routes by hash has to know that, and what to hash.
CREATE OR REPLACE VIEW shardmove_catalog.current_routes AS
    SELECT r.epoch, r.keyspace, r.lower, r.upper, r.shard, r.move_id, r.held, k.key_type, k.scheme
    FROM shardmove_catalog.route r LEFT JOIN shardmove_catalog.keyspace k ON k.name = r.keyspace
    WHERE r.epoch = (SELECT epoch FROM shardmove_catalog.cluster);
