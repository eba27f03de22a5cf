-- Layout 2: partitioned tables, texts as keys, and what `run --create-schema` leaves for after the copy.
ALTER TABLE shardmove.moving_table
    ADD COLUMN IF NOT EXISTS is_partitioned boolean NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS key_collated boolean NOT NULL DEFAULT true;

-- Where all tables are published, an update or delete of a table without a replica identity is refused.
ALTER TABLE shardmove.about REPLICA IDENTITY FULL;
ALTER TABLE shardmove.kept REPLICA IDENTITY FULL;

-- Statements that make the secondary indexes, foreign keys and triggers of tables that a move has created here. Each row
-- goes in the transaction that ran it.
CREATE TABLE IF NOT EXISTS shardmove.later (
    move_id text NOT NULL,
    number integer NOT NULL,
    statement text NOT NULL,
    PRIMARY KEY (move_id, number)
);
