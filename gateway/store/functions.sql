-- Functions: the arithmetic of limits and queues in PostgreSQL, for gateways on several hosts.
--
-- It is the arithmetic of gateway/limits/rules.py and gateway/admission/memory.py. tests/store/test_arithmetic.py runs
-- one table of cases against both, and compares the constants with those that their comments name. A migration makes
-- the functions: see 0013_functions.py.
--
-- An owner is a worker of a gateway. An owner that is silent for `patience` seconds does not count.


-- Show that an owner lives, and return the gateways' own clock. Each owner contributes its count of that clock, kept by a
-- clock of its host that nobody sets, and the furthest counts. The database's own clock only bridges the time since the
-- last beat, so that a gateway that comes now is not behind. Set forward, it moves this clock by three seconds at most;
-- set back, not at all.
CREATE OR REPLACE FUNCTION stack_beat(me text, moment double precision, OUT clock double precision) AS $$
BEGIN
    UPDATE account_clock SET
        now = greatest(now + least(extract(epoch FROM clock_timestamp() - wall), 3), now, moment),
        wall = clock_timestamp()
        RETURNING now INTO clock;
    INSERT INTO account_owners VALUES (me, clock) ON CONFLICT (id) DO UPDATE SET beat = excluded.beat;
    DELETE FROM account_owners WHERE beat < clock - 600;
END $$ LANGUAGE plpgsql;


-- Charge a key one request and `cost` tokens, if its limits allow that. A null is no limit. Times are seconds of the
-- gateways' clock. Tokens are counted in the account's own day and month, which are returned: a host whose clock is
-- behind begins no new ones. A new account begins with what the records know of its key, or of its user if it is named
-- `key/user`. So does one that is more than a day ahead, because a host's clock was wrong.
CREATE OR REPLACE FUNCTION stack_charge(
    key text, me text, moment double precision, patience double precision,
    today bigint, this_month bigint, month_began bigint, cost bigint,
    per_minute bigint, tokens_per_minute bigint, concurrent bigint, tokens_per_day bigint, tokens_per_month bigint,
    OUT admitted boolean, OUT its_day bigint, OUT its_month bigint,
    OUT clock double precision, OUT requests double precision, OUT tokens double precision,
    OUT in_progress bigint, OUT spent_today bigint, OUT spent_this_month bigint
) AS $$
DECLARE
    it accounts;
    minute constant double precision := 60;  -- gateway.limits.rules.MINUTE
    grain constant double precision := 0.001;  -- gateway.limits.rules.GRAIN
BEGIN
    SELECT * INTO it FROM accounts WHERE key_id = key FOR UPDATE;
    IF NOT FOUND OR it.day > today + 1 THEN
        INSERT INTO accounts SELECT key, moment, 0, 0,
            today, coalesce(sum(coalesce(tokens_in, 0) + coalesce(tokens_out, 0)) FILTER (WHERE at >= today * 86400000), 0),
            this_month, coalesce(sum(coalesce(tokens_in, 0) + coalesce(tokens_out, 0)), 0)
            FROM usage WHERE key_id = split_part(key, '/', 1) AND at >= month_began
                AND split_part(key, '/', 2) IN ('', user_id)
            ON CONFLICT (key_id) DO UPDATE SET day = excluded.day, day_tokens = excluded.day_tokens,
                month = excluded.month, month_tokens = excluded.month_tokens WHERE accounts.day > today + 1;
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
        AND (per_minute IS NULL
            OR it.requests_full - clock - minute + minute / per_minute <= grain * minute / per_minute)
        AND (tokens_per_minute IS NULL OR it.tokens_full - clock - minute
            + least(cost, tokens_per_minute) * minute / tokens_per_minute <= grain * minute / tokens_per_minute);
    IF admitted THEN
        IF per_minute IS NOT NULL THEN
            it.requests_full := greatest(it.requests_full, clock) + minute / per_minute;
        END IF;
        IF tokens_per_minute IS NOT NULL THEN
            it.tokens_full := greatest(it.tokens_full, clock) + cost * minute / tokens_per_minute;
        END IF;
        it.day_tokens := it.day_tokens + cost;
        it.month_tokens := it.month_tokens + cost;
        UPDATE accounts SET seen = clock, requests_full = it.requests_full, tokens_full = it.tokens_full,
            day = it.day, day_tokens = it.day_tokens, month = it.month, month_tokens = it.month_tokens
            WHERE key_id = key;
        INSERT INTO account_leases VALUES (key, me, 1)
            ON CONFLICT (key_id, owner) DO UPDATE SET active = account_leases.active + 1;
    END IF;
    its_day := it.day;
    its_month := it.month;
    requests := it.requests_full;
    tokens := it.tokens_full;
    spent_today := it.day_tokens;
    spent_this_month := it.month_tokens;
END $$ LANGUAGE plpgsql;


-- End `ended` requests of a key. They took `more` tokens than was charged, so its bucket is full `delay` seconds later.
-- They were counted in that day and month.
CREATE OR REPLACE FUNCTION stack_settle(
    key text, me text, its_day bigint, its_month bigint, more bigint, delay double precision, ended integer
) RETURNS void AS $$
BEGIN
    UPDATE accounts SET tokens_full = tokens_full + delay,
        day_tokens = day_tokens + CASE WHEN day = its_day THEN more ELSE 0 END,
        month_tokens = month_tokens + CASE WHEN month = its_month THEN more ELSE 0 END
        WHERE key_id = key;
    UPDATE account_leases SET active = active - ended WHERE key_id = key AND owner = me;
END $$ LANGUAGE plpgsql;


-- Whether a request for this model may have a slot: Models.served. `target` is the model that the engine loads as soon
-- as it is idle; 0 if there is none. The gateways decide that (gateway.admission.swaps).
CREATE OR REPLACE FUNCTION stack_serves(loads jsonb, target bigint, its_model bigint, busy boolean) RETURNS boolean AS $$
    SELECT CASE WHEN loads IS NULL OR NOT (loads->>'scarce')::boolean THEN true
        WHEN target <> 0 THEN its_model = target AND NOT busy
        ELSE its_model = 0 OR loads->'loaded' @> to_jsonb(its_model) END
$$ LANGUAGE sql;


-- Note that a request for this model has got a slot: Loads.begins.
CREATE OR REPLACE FUNCTION stack_loads(which text, its_model bigint, instant double precision) RETURNS void AS $$
BEGIN
    UPDATE queue_engines SET loads = loads || jsonb_build_object('loaded', jsonb_build_array(), 'last', its_model,
        'before', instant - (loads->>'since')::double precision, 'begun', instant)
        WHERE name = which AND (loads->>'scarce')::boolean AND its_model <> 0
            AND NOT loads->'loaded' @> to_jsonb(its_model)
            AND NOT ((loads->>'begun')::double precision > 0 AND (loads->>'last')::bigint = its_model);
END $$ LANGUAGE plpgsql;


-- In about how many seconds a new request for the model may get a slot as far as its model is concerned: Loads.turn. The
-- last two are swaps.Limit.
CREATE OR REPLACE FUNCTION stack_turn(
    loads jsonb, its_model bigint, instant double precision, swap_wait double precision, swap_most double precision
) RETURNS double precision AS $$
DECLARE
    last bigint := loads->>'last';
    begun double precision := loads->>'begun';
    guessed double precision; its_cost double precision; last_cost double precision;
    guess constant double precision := 5;  -- gateway.admission.swaps.GUESS
    late constant double precision := 5;  -- gateway.admission.swaps.LATE
BEGIN
    IF loads IS NULL OR NOT (loads->>'scarce')::boolean OR its_model = 0 OR loads->'loaded' @> to_jsonb(its_model) THEN
        RETURN 0;
    END IF;
    SELECT coalesce(max(value::double precision), guess) INTO guessed FROM jsonb_each_text(loads->'costs');
    its_cost := coalesce((loads->'costs'->>its_model::text)::double precision, guessed);
    last_cost := coalesce((loads->'costs'->>last::text)::double precision, guessed);
    IF last = its_model AND begun > 0 AND instant < begun + 2 * last_cost + late THEN
        RETURN greatest(begun + its_cost - instant, 0);
    END IF;
    IF jsonb_array_length(loads->'loaded') = 0 THEN
        RETURN 0;
    END IF;
    RETURN greatest(greatest(instant, (loads->>'since')::double precision)
        + coalesce(nullif(swap_wait, 0), least(2 * (its_cost + last_cost), swap_most)) - instant, 0);
END $$ LANGUAGE plpgsql;


-- Give free slots to requests that wait, and notify their owners. Moments of the queues are the database's own, in
-- seconds since 1970, because all of them are short.
CREATE OR REPLACE FUNCTION stack_hand_over(which text, moment double precision, patience double precision)
RETURNS void AS $$
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
        SELECT p.* INTO it FROM queue_places p JOIN queue_engines e ON e.name = which
            WHERE p.engine = which AND NOT held AND until > instant AND stack_serves(e.loads, e.target, p.model,
                EXISTS (SELECT FROM queue_places WHERE engine = which AND held))
            ORDER BY tag, since, id LIMIT 1;
        EXIT WHEN NOT FOUND;
        PERFORM stack_loads(which, it.model, instant);
        UPDATE queue_places SET held = true, since = instant WHERE id = it.id;
        UPDATE queue_engines SET virtual = greatest(virtual, it.tag) WHERE name = which;
        PERFORM pg_notify('stack_' || it.owner, it.id::text);
        free := free - 1;
    END LOOP;
END $$ LANGUAGE plpgsql;


-- Promise a request when it may return, and return the seconds until then: Promises.promise. `fits` is the first moment
-- that could be promised. Called under the lock of the engine's row.
CREATE OR REPLACE FUNCTION stack_promise(
    which text, key text, its_mark text, its_weight integer, instant double precision, fits double precision
) RETURNS double precision AS $$
DECLARE
    apart double precision; share double precision; its_line double precision;
    keys bigint;
    due double precision;
    slower constant double precision := 1.25;  -- gateway.admission.retry_after.SLOWER
    unknown constant double precision := 1;  -- gateway.admission.memory.UNKNOWN
    keeps constant double precision := 512;  -- gateway.admission.retry_after.KEEPS
    promises constant bigint := 8192;  -- gateway.admission.retry_after.PROMISES
    longest constant double precision := 600;  -- gateway.admission.retry_after.LONGEST
BEGIN
    SELECT line INTO its_line FROM queue_keys WHERE engine = which AND key_id = key;
    SELECT slower * coalesce(nullif(seconds, 0), unknown) / slots INTO apart FROM queue_engines WHERE name = which;
    SELECT count(*) + 1, (coalesce(sum(other.weight), 0) + its_weight) / its_weight INTO keys, share
        FROM (SELECT max(known.weight) AS weight FROM (
            SELECT key_id, 1 / cost AS weight FROM queue_places WHERE engine = which AND NOT held AND cost > 0
            UNION ALL SELECT key_id, weight FROM queue_keys WHERE engine = which AND line > instant
        ) known WHERE key_id <> key GROUP BY key_id) other;
    IF its_line > fits THEN
        IF its_line - fits > least(longest, least(keeps, greatest(promises / 2 / keys, 1)) * apart * share) THEN
            RETURN its_line - instant;
        END IF;
        due := its_line + apart * share;
    ELSE
        due := fits + apart * (share + (share - 1) * (random() - 0.5));
    END IF;
    UPDATE queue_keys SET line = due, weight = its_weight WHERE engine = which AND key_id = key;
    INSERT INTO queue_promises (engine, mark, due) VALUES (which, its_mark, due);
    RETURN due - instant;
END $$ LANGUAGE plpgsql;


-- Let a request in: Places.enter. It returns the place and whether that has a slot; otherwise a reason and the seconds
-- after which the request may return. `key` is `key` or `key/user`. Gateways of an older version do not tell the last two.
CREATE OR REPLACE FUNCTION stack_enter(
    which text, its_slots integer, me text, moment double precision, patience double precision,
    key text, its_mark text, weight integer, wait double precision, queue integer, ahead boolean, its_model bigint,
    swap_wait double precision DEFAULT 0, swap_most double precision DEFAULT 30,
    OUT place bigint, OUT has_slot boolean, OUT reason text, OUT after double precision
) AS $$
DECLARE
    it queue_engines;
    instant double precision := extract(epoch FROM clock_timestamp());
    person text := split_part(key, '/', 2);
    its_turn double precision := 0;
    its_last double precision := -1;
    its_tag double precision;
    its_cost double precision := 0;
    taken bigint; waiting bigint; own bigint; users bigint; behind bigint; before bigint; weights double precision;
    turns double precision; its_due double precision; expected double precision;
    lined bigint;
    kept boolean := false;
    grace constant double precision := 5;  -- gateway.admission.retry_after.GRACE
    early constant double precision := 0.05;  -- gateway.admission.retry_after.EARLY
    leeway constant double precision := 0.7;  -- gateway.admission.memory.LEEWAY
BEGIN
    INSERT INTO queue_engines (name) VALUES (which) ON CONFLICT DO NOTHING;
    UPDATE queue_engines SET slots = its_slots WHERE name = which RETURNING * INTO it;
    DELETE FROM queue_places WHERE engine = which
        AND owner IN (SELECT id FROM account_owners WHERE beat <= moment - patience);
    key := split_part(key, '/', 1);
    IF NOT ahead THEN
        INSERT INTO queue_keys (engine, key_id) VALUES (which, key) ON CONFLICT DO NOTHING;
        SELECT greatest(it.virtual, finish) INTO its_last FROM queue_keys WHERE engine = which AND key_id = key;
        its_cost := 1.0 / weight;
    END IF;
    IF person <> '' AND NOT ahead THEN  -- Places._turn
        SELECT greatest(coalesce(max(turn) FILTER (WHERE held), min(turn), 0),
            coalesce(max(turn) FILTER (WHERE user_id = person) + 1, 0))
            INTO its_turn FROM queue_places WHERE engine = which AND key_id = key AND cost > 0;
    END IF;
    SELECT count(*), coalesce(min(tag), its_last) INTO behind, its_tag FROM queue_places
        WHERE person <> '' AND NOT ahead AND engine = which AND key_id = key AND NOT held AND cost > 0 AND turn > its_turn;
    SELECT count(*) FILTER (WHERE held), count(*) FILTER (WHERE NOT held),
        count(*) FILTER (WHERE NOT held AND key_id = key),
        count(*) FILTER (WHERE NOT held AND key_id = key AND user_id = person AND person <> ''),
        count(*) FILTER (WHERE NOT held AND tag <= its_tag) - least(behind, 1)
        INTO taken, waiting, own, users, before FROM queue_places WHERE engine = which;
    has_slot := taken < its_slots AND stack_serves(it.loads, it.target, its_model, taken > 0)
        AND NOT EXISTS (SELECT FROM queue_places WHERE engine = which AND NOT held
            AND stack_serves(it.loads, it.target, model, taken > 0));

    IF NOT has_slot AND NOT ahead THEN
        DELETE FROM queue_promises WHERE engine = which AND due <= instant - grace;
        DELETE FROM queue_promises WHERE id = (SELECT id FROM queue_promises
            WHERE engine = which AND mark = its_mark AND due <= instant + early ORDER BY due LIMIT 1);
        kept := FOUND AND waiting < queue + queue / 2 + 8;
        SELECT coalesce(sum(other.weight), 0) + stack_enter.weight INTO weights
            FROM (SELECT max(1 / cost) AS weight FROM queue_places
                WHERE engine = which AND NOT held AND cost > 0 AND key_id <> key GROUP BY key_id) other;
        turns := greatest(before + 1, (own - behind + 1) * weights / weight);
        SELECT count(*) INTO lined FROM queue_keys WHERE engine = which AND line > instant;
        its_due := CASE WHEN taken + waiting = 0 THEN 0  -- the gateway decides about a swap as soon as the request waits
            ELSE stack_turn(it.loads, its_model, instant, swap_wait, swap_most) END;
        expected := its_due + CASE WHEN kept THEN before + 1 ELSE turns END * it.seconds / its_slots;
        reason := CASE
            WHEN waiting >= queue AND NOT kept THEN 'full'
            WHEN own + users >= queue - waiting AND NOT kept THEN 'share'
            WHEN expected > wait * CASE WHEN kept OR lined = 0 THEN 1.0 ELSE leeway END THEN 'deadline'
        END;
    END IF;
    IF reason IS NOT NULL THEN
        after := stack_promise(which, key, its_mark, weight, instant,
            instant + CASE reason WHEN 'deadline' THEN greatest(expected - leeway * wait, 0) ELSE its_due END);
        RETURN;
    END IF;
    IF has_slot THEN
        PERFORM stack_loads(which, its_model, instant);
    END IF;
    IF behind > 0 THEN
        UPDATE queue_places SET tag = coalesce(later.tag, its_last) FROM (
            SELECT id, lead(tag) OVER (ORDER BY tag, since, id) AS tag FROM queue_places
            WHERE engine = which AND key_id = key AND NOT held AND cost > 0 AND turn > its_turn
        ) later WHERE queue_places.id = later.id;
    END IF;
    INSERT INTO queue_places (engine, owner, key_id, user_id, held, tag, turn, cost, since, until, model)
        VALUES (which, me, key, person, has_slot, its_tag, its_turn, its_cost, instant, instant + wait, its_model)
        RETURNING id INTO place;
    UPDATE queue_keys SET finish = its_last + its_cost WHERE engine = which AND key_id = key AND NOT ahead;
    IF has_slot THEN
        UPDATE queue_engines SET virtual = greatest(virtual, its_tag) WHERE name = which;
    ELSE  -- owners that are silent may have left slots
        PERFORM stack_hand_over(which, moment, patience);
        SELECT held INTO has_slot FROM queue_places WHERE id = place;
    END IF;
END $$ LANGUAGE plpgsql;


-- Tell a request that waited in vain when to return: Places.again. It returns the seconds.
CREATE OR REPLACE FUNCTION stack_again(
    which text, key text, its_mark text, weight integer, OUT after double precision
) AS $$
DECLARE
    instant double precision := extract(epoch FROM clock_timestamp());
BEGIN
    PERFORM FROM queue_engines WHERE name = which FOR UPDATE;
    INSERT INTO queue_keys (engine, key_id) VALUES (which, key) ON CONFLICT DO NOTHING;
    after := stack_promise(which, key, its_mark, weight, instant, instant);
END $$ LANGUAGE plpgsql;


-- End a request's place: Places.leave. A request that was not `served` says nothing about the engine's pace.
CREATE OR REPLACE FUNCTION stack_leave(
    its_id bigint, moment double precision, patience double precision, served boolean
) RETURNS void AS $$
DECLARE
    it queue_places;
    which text;
    instant double precision := extract(epoch FROM clock_timestamp());
    samples constant integer := 32;  -- gateway.admission.memory.SAMPLES
BEGIN
    SELECT engine INTO which FROM queue_places WHERE id = its_id;
    PERFORM FROM queue_engines WHERE name = which FOR UPDATE;
    DELETE FROM queue_places WHERE id = its_id RETURNING * INTO it;
    IF it.held THEN
        UPDATE queue_engines SET seen = least(seen + 1, samples),
            seconds = seconds + (instant - it.since - seconds) / least(seen + 1, samples)
            WHERE name = which AND served;
    ELSIF it.id IS NOT NULL THEN
        UPDATE queue_places SET tag = tag - it.cost WHERE engine = which AND NOT held AND key_id = it.key_id
            AND cost > 0 AND (tag, since, id) > (it.tag, it.since, it.id);
        UPDATE queue_keys SET finish = finish - it.cost WHERE engine = which AND key_id = it.key_id;
    END IF;
    PERFORM stack_hand_over(which, moment, patience);
END $$ LANGUAGE plpgsql;
