"""Slots and queues of engines for gateways on several hosts (gateway/queues.py): PostgreSQL only."""

from alembic import op

revision = "0007"
down_revision = "0006"

# Owners and the clock are those of 0004. Moments here are the database's own, in seconds since 1970: all are short.
TABLES = """
CREATE TABLE queue_engines (
    name text PRIMARY KEY,
    slots integer NOT NULL DEFAULT 1,
    virtual double precision NOT NULL DEFAULT 0,
    seconds double precision NOT NULL DEFAULT 0,
    seen integer NOT NULL DEFAULT 0,
    horizon double precision NOT NULL DEFAULT 0
);
CREATE TABLE queue_keys (
    engine text,
    key_id text,
    finish double precision NOT NULL DEFAULT 0,
    line double precision NOT NULL DEFAULT 0,
    PRIMARY KEY (engine, key_id)
);
CREATE TABLE queue_places (
    id bigserial PRIMARY KEY,
    engine text NOT NULL,
    owner text NOT NULL REFERENCES account_owners ON DELETE CASCADE,
    key_id text NOT NULL,
    held boolean NOT NULL,
    tag double precision NOT NULL,
    cost double precision NOT NULL,
    since double precision NOT NULL,
    until double precision NOT NULL
);
CREATE INDEX queue_places_engine ON queue_places (engine);
CREATE INDEX queue_places_owner ON queue_places (owner);
CREATE TABLE queue_promises (
    id bigserial PRIMARY KEY,
    engine text NOT NULL,
    mark text NOT NULL,
    due double precision NOT NULL
);
CREATE INDEX queue_promises_due ON queue_promises (engine, due);
CREATE INDEX queue_promises_mark ON queue_promises (engine, mark);
"""

# Who waits is given free slots, and its worker is told. What owners had that are silent for `patience` is nobody's.
HAND_OVER = """
CREATE FUNCTION stack_hand_over(which text, moment double precision, patience double precision) RETURNS void AS $$
DECLARE
    it queue_places;
    free bigint;
    instant double precision := extract(epoch FROM clock_timestamp());
BEGIN
    PERFORM FROM queue_engines WHERE name = which FOR UPDATE;
    DELETE FROM queue_places WHERE engine = which
        AND owner IN (SELECT id FROM account_owners WHERE beat <= moment - patience);
    SELECT slots - (SELECT count(*) FROM queue_places WHERE engine = which AND held) INTO free
        FROM queue_engines WHERE name = which;
    WHILE free > 0 LOOP
        SELECT * INTO it FROM queue_places WHERE engine = which AND NOT held AND until > instant
            ORDER BY tag, since, id LIMIT 1;
        EXIT WHEN NOT FOUND;
        UPDATE queue_places SET held = true, since = instant WHERE id = it.id;
        UPDATE queue_engines SET virtual = greatest(virtual, it.tag) WHERE name = which;
        PERFORM pg_notify('stack_' || it.owner, it.id::text);
        free := free - 1;
    END LOOP;
END $$ LANGUAGE plpgsql;
"""

# The arithmetic is that of gateway/places.py.
ENTER = """
CREATE FUNCTION stack_enter(
    which text, its_slots integer, me text, moment double precision, patience double precision,
    key text, its_mark text, weight integer, wait double precision, queue integer, ahead boolean,
    OUT place bigint, OUT has_slot boolean, OUT reason text, OUT after double precision
) AS $$
DECLARE
    it queue_engines;
    instant double precision := extract(epoch FROM clock_timestamp());
    its_tag double precision := -1;
    its_cost double precision := 0;
    its_line double precision := 0;
    taken bigint; waiting bigint; own bigint; before bigint; weights double precision;
    turns double precision; expected double precision; apart double precision;
    alike bigint; latest double precision;
    kept boolean := false;
BEGIN
    INSERT INTO queue_engines (name) VALUES (which) ON CONFLICT DO NOTHING;
    UPDATE queue_engines SET slots = its_slots WHERE name = which RETURNING * INTO it;
    DELETE FROM queue_places WHERE engine = which
        AND owner IN (SELECT id FROM account_owners WHERE beat <= moment - patience);
    IF NOT ahead THEN
        INSERT INTO queue_keys (engine, key_id) VALUES (which, key) ON CONFLICT DO NOTHING;
        SELECT greatest(it.virtual, queue_keys.finish), queue_keys.line INTO its_tag, its_line
            FROM queue_keys WHERE engine = which AND key_id = key;
        its_cost := 1.0 / weight;
    END IF;
    SELECT count(*) FILTER (WHERE held), count(*) FILTER (WHERE NOT held),
        count(*) FILTER (WHERE NOT held AND key_id = key), count(*) FILTER (WHERE NOT held AND tag <= its_tag)
        INTO taken, waiting, own, before FROM queue_places WHERE engine = which;
    has_slot := taken < its_slots AND waiting = 0;

    DELETE FROM queue_promises WHERE id = (SELECT id FROM queue_promises
        WHERE engine = which AND mark = its_mark AND due BETWEEN instant - 5 AND instant + 0.05 ORDER BY due LIMIT 1);
    kept := FOUND AND waiting < queue + queue / 2 + 8;
    DELETE FROM queue_promises WHERE engine = which AND due < instant - 5;

    IF NOT has_slot AND NOT ahead THEN
        SELECT coalesce(sum(a.weight), 0) + stack_enter.weight INTO weights
            FROM (SELECT max(1 / cost) AS weight FROM queue_places
                WHERE engine = which AND NOT held AND cost > 0 AND key_id <> key GROUP BY key_id) a;
        turns := greatest(before + 1, (own + 1) * weights / weight);
        expected := CASE WHEN kept THEN before + 1 ELSE turns END * it.seconds / its_slots;
        reason := CASE
            WHEN waiting >= queue AND NOT kept THEN 'full'
            WHEN own >= queue - waiting AND NOT kept THEN 'share'
            WHEN expected > wait * CASE WHEN kept OR it.horizon < instant THEN 1.0 ELSE 0.7 END THEN 'deadline'
        END;
    END IF;
    IF reason IS NULL THEN
        INSERT INTO queue_places (engine, owner, key_id, held, tag, cost, since, until)
            VALUES (which, me, key, has_slot, its_tag, its_cost, instant, instant + wait) RETURNING id INTO place;
        UPDATE queue_keys SET finish = its_tag + its_cost WHERE engine = which AND key_id = key AND NOT ahead;
        IF has_slot THEN
            UPDATE queue_engines SET virtual = greatest(virtual, its_tag) WHERE name = which;
        ELSE  -- slots may have come free by those who are gone
            PERFORM stack_hand_over(which, moment, patience);
            SELECT held INTO has_slot FROM queue_places WHERE id = place;
        END IF;
        RETURN;
    END IF;

    SELECT count(*), max(due) - instant INTO alike, latest FROM queue_promises WHERE engine = which AND mark = its_mark;
    IF alike >= 512 AND latest > 0 THEN
        after := latest;
        RETURN;
    END IF;
    apart := 1.25 * coalesce(nullif(it.seconds, 0), 1) / its_slots;
    IF reason = 'share' THEN
        after := greatest(its_line - instant, 0) + apart * turns / (own + 1);
        UPDATE queue_keys SET line = instant + after WHERE engine = which AND key_id = key;
    ELSE
        after := apart + greatest(it.horizon - instant,
            CASE reason WHEN 'deadline' THEN expected - 0.7 * wait ELSE 0 END, 0);
        UPDATE queue_engines SET horizon = instant + after WHERE name = which;
    END IF;
    INSERT INTO queue_promises (engine, mark, due) VALUES (which, its_mark, instant + after);
END $$ LANGUAGE plpgsql;
"""

LEAVE = """
CREATE FUNCTION stack_leave(its_id bigint, moment double precision, patience double precision) RETURNS void AS $$
DECLARE
    it queue_places;
    which text;
    instant double precision := extract(epoch FROM clock_timestamp());
BEGIN
    SELECT engine INTO which FROM queue_places WHERE id = its_id;
    PERFORM FROM queue_engines WHERE name = which FOR UPDATE;
    DELETE FROM queue_places WHERE id = its_id RETURNING * INTO it;
    IF it.held THEN
        UPDATE queue_engines SET seen = least(seen + 1, 32),
            seconds = seconds + (instant - it.since - seconds) / least(seen + 1, 32) WHERE name = which;
    ELSIF it.id IS NOT NULL THEN
        UPDATE queue_places SET tag = tag - it.cost WHERE engine = which AND NOT held AND key_id = it.key_id
            AND cost > 0 AND (tag, since, id) > (it.tag, it.since, it.id);
        UPDATE queue_keys SET finish = finish - it.cost WHERE engine = which AND key_id = it.key_id;
    END IF;
    PERFORM stack_hand_over(which, moment, patience);
END $$ LANGUAGE plpgsql;
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for text in (TABLES, HAND_OVER, ENTER, LEAVE):
            op.get_bind().exec_driver_sql(text)
