"""Accounts of limits for gateways on several hosts (gateway/replicas.py): PostgreSQL only."""

from alembic import op

revision = "0004"
down_revision = "0003"

# Times are seconds of the replicas' own clock, see stack_beat. `seen` is when an account was last charged.
TABLES = """
CREATE TABLE account_clock (now double precision NOT NULL, wall timestamptz NOT NULL);
INSERT INTO account_clock VALUES (0, clock_timestamp());
CREATE TABLE account_owners (id text PRIMARY KEY, beat double precision NOT NULL);
CREATE TABLE accounts (
    key_id text PRIMARY KEY,
    seen double precision NOT NULL,
    requests_full double precision NOT NULL,
    tokens_full double precision NOT NULL,
    day bigint NOT NULL,
    day_tokens bigint NOT NULL,
    month bigint NOT NULL,
    month_tokens bigint NOT NULL
);
CREATE TABLE account_leases (
    key_id text,
    owner text REFERENCES account_owners ON DELETE CASCADE,
    active integer NOT NULL,
    PRIMARY KEY (key_id, owner)
);
"""

# An owner is a worker of a gateway. Each brings in its own count of the clock, kept by that of its host which nobody
# sets, and the one that is furthest counts. The database's own clock only bridges the time since the last beat, so that
# who comes now is not behind: set forward, it moves this one by three seconds at most, set back, not at all.
BEAT = """
CREATE FUNCTION stack_beat(me text, moment double precision, OUT clock double precision) AS $$
BEGIN
    UPDATE account_clock SET
        now = greatest(now + least(extract(epoch FROM clock_timestamp() - wall), 3), now, moment),
        wall = clock_timestamp()
        RETURNING now INTO clock;
    INSERT INTO account_owners VALUES (me, clock) ON CONFLICT (id) DO UPDATE SET beat = excluded.beat;
    DELETE FROM account_owners WHERE beat < clock - 600;
END $$ LANGUAGE plpgsql;
"""

# The arithmetic is that of gateway/limits.py. `patience` is how long an owner counts after its last beat. A new account
# begins with what the records know of its key.
ADMIT = """
CREATE FUNCTION stack_admit(
    key text, me text, moment double precision, patience double precision,
    today bigint, this_month bigint, month_began bigint, cost bigint,
    per_minute bigint, tokens_per_minute bigint, concurrent bigint, tokens_per_day bigint, tokens_per_month bigint,
    OUT admitted boolean, OUT clock double precision, OUT requests double precision, OUT tokens double precision,
    OUT in_progress bigint, OUT spent_today bigint, OUT spent_this_month bigint
) AS $$
DECLARE
    it accounts;
    grain constant double precision := 60e-3;
BEGIN
    SELECT * INTO it FROM accounts WHERE key_id = key FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO accounts SELECT key, moment, 0, 0,
            today, coalesce(sum(tokens_in + tokens_out) FILTER (WHERE at >= today * 86400000), 0),
            this_month, coalesce(sum(tokens_in + tokens_out), 0)
            FROM usage WHERE key_id = key AND at >= month_began
            ON CONFLICT DO NOTHING;
        SELECT * INTO it FROM accounts WHERE key_id = key FOR UPDATE;
    END IF;
    clock := greatest(moment, it.seen);
    IF it.day < today THEN
        it.day := today;
        it.day_tokens := 0;
    END IF;
    IF it.month < this_month THEN
        it.month := this_month;
        it.month_tokens := 0;
    END IF;
    SELECT coalesce(sum(active), 0) INTO in_progress FROM account_leases JOIN account_owners ON id = owner
        WHERE key_id = key AND beat > clock - patience;
    admitted := (tokens_per_day IS NULL OR it.day_tokens < tokens_per_day)
        AND (tokens_per_month IS NULL OR it.month_tokens < tokens_per_month)
        AND (concurrent IS NULL OR in_progress < concurrent)
        AND (per_minute IS NULL OR it.requests_full - clock - 60 + 60.0 / per_minute <= grain / per_minute)
        AND (tokens_per_minute IS NULL OR it.tokens_full - clock - 60
            + least(cost, tokens_per_minute) * 60.0 / tokens_per_minute <= grain / tokens_per_minute);
    IF admitted THEN
        IF per_minute IS NOT NULL THEN
            it.requests_full := greatest(it.requests_full, clock) + 60.0 / per_minute;
        END IF;
        IF tokens_per_minute IS NOT NULL THEN
            it.tokens_full := greatest(it.tokens_full, clock) + cost * 60.0 / tokens_per_minute;
        END IF;
        it.day_tokens := it.day_tokens + cost;
        it.month_tokens := it.month_tokens + cost;
        UPDATE accounts SET seen = clock, requests_full = it.requests_full, tokens_full = it.tokens_full,
            day = it.day, day_tokens = it.day_tokens, month = it.month, month_tokens = it.month_tokens
            WHERE key_id = key;
        INSERT INTO account_leases VALUES (key, me, 1)
            ON CONFLICT (key_id, owner) DO UPDATE SET active = account_leases.active + 1;
    END IF;
    requests := it.requests_full;
    tokens := it.tokens_full;
    spent_today := it.day_tokens;
    spent_this_month := it.month_tokens;
END $$ LANGUAGE plpgsql;
"""

# `ended` requests of a key are over. They took `more` tokens than was charged, with which its bucket is full `delay`
# seconds later; they were of that day and month.
SETTLE = """
CREATE FUNCTION stack_settle(
    key text, me text, its_day bigint, its_month bigint, more bigint, delay double precision, ended integer
) RETURNS void AS $$
BEGIN
    UPDATE accounts SET tokens_full = tokens_full + delay,
        day_tokens = day_tokens + CASE WHEN day = its_day THEN more ELSE 0 END,
        month_tokens = month_tokens + CASE WHEN month = its_month THEN more ELSE 0 END
        WHERE key_id = key;
    UPDATE account_leases SET active = active - ended WHERE key_id = key AND owner = me;
END $$ LANGUAGE plpgsql;
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for text in (TABLES, BEAT, ADMIT, SETTLE):
            op.get_bind().exec_driver_sql(text)
