-- What a PostgreSQL server does for a lock, each verb in one function, one statement and one transaction.  Names and
-- values come as parameters, never as text.  The functions have the number of this text in their names, VERSION, so that
-- programs with another text can use the same locks; the table is that of all.
--
-- A lock is a row of coheld.lock, and who changes anything of it locks the row first.
--   g u w    the grant: its nonce, the end of its lease (microseconds of this server's clock), who has it
--   k b d    the session key of the process that has it, of which run of the server, and since when the key is free
--   t        the last token
--   i v s    incarnation, number and bytes of the state; c: __create__ has returned.  The number is of the clock: after
--            the last writes were lost, none is given again that a host knows another state by
--   r        who lost it without giving it back, until the next has put that right
--   l        the last change, so that one whose answer was lost is not made twice: a nonce, and digits that grow
--   n e      who is in turn, and until when nobody else may have it
--   waiting  who waits, in that order: session keys
--
-- A process that asks has a session which listens, and which holds an advisory lock on a number of its own as long as
-- it lives: its session key.  A key that is free says that the session is gone: the process has ended, or the connection
-- was cut and the process connects anew.  Nobody can tell one from the other at that moment, so for a holder:
--
--   key                  d        what becomes of the grant
--   taken                -        its lease stands; who waits first has a session sit at the key (attend)
--   free, first seen     is set   its lease stands: a process that lives has taken its key again within GRACE
--   free, GRACE later    is set   over: the next in turn has it, and is told who was lost
--   taken again          cleared  by who looks; and the process that has taken it renews its leases at once, which
--                                 clears d, too.  So d is never of a session before that one, but where the process
--                                 could not say a word between two cuts: it was not heard for GRACE then
--   of another run       -        says nothing: all sessions end with a server.  The lease stands, until the holder has
--                                 renewed it, and with it k and b
--   null                 -        the process had no session when it was granted or renewed; as before
--
-- A grant that was over and whose holder lives all the same cannot write: g is another's.  A key is looked at by taking
-- it shared, for the transaction: two that look at once do not disturb each other, and the process that wants its own
-- key back waits for moments.  If the session of before still has it (half-open), the process ends that one.  Looking
-- never waits; a process that waits for its key, or for the row, holds no other.
--
-- Whoever waits listens at a channel of its own.  The lock is offered to the first: e is its time to come, and if its
-- key is free, it is the next one's turn at once.  One that does not come loses its place; who is behind it hears of
-- the offer as well, so that it looks when that is over.
--
-- News of a lock is said only if somebody listens: a session that does has an advisory lock on the name's number.  It
-- takes that before it listens, so from then on nothing is left unsaid; what was said before it has listened, it sees
-- in the state, which it looks at afterwards.  What nobody waits for any more it gives up, as all such locks of all
-- sessions are in one table of the server, which has room for some thousands.
--
-- A grant does not wait for the disk, nor what gives one back without a change.  A server that crashes may forget those:
-- the holder is refused then, and tokens go on from the clock.  What changes the state waits, as the server is set up.

DO $$ BEGIN
    IF pg_catalog.to_regnamespace('coheld') IS NULL THEN CREATE SCHEMA coheld; END IF;
    IF pg_catalog.to_regclass('coheld.lock') IS NULL THEN
        CREATE TABLE coheld.lock (
            name text COLLATE "C" PRIMARY KEY,
            g bytea, u bigint, w bytea, k bigint, b bigint, d bigint,
            t bigint NOT NULL DEFAULT 0,
            i bytea, v bigint NOT NULL DEFAULT 0, s bytea, c boolean NOT NULL DEFAULT false,
            r bytea, l bytea, n bigint, e bigint,
            waiting bigint[] NOT NULL DEFAULT '{}'
        ) WITH (fillfactor = 50);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION coheld.now_VERSION() RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT (pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) * 1000000)::bigint
$$;

CREATE OR REPLACE FUNCTION coheld.run_VERSION() RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT (pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) * 1000000)::bigint
$$;

CREATE OR REPLACE FUNCTION coheld.news_VERSION(_name text) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT pg_catalog.hashtextextended('coheld:news:' || _name, 0)
$$;

CREATE OR REPLACE FUNCTION coheld.wake_VERSION(_key bigint, _name text) RETURNS void LANGUAGE sql VOLATILE AS $$
    SELECT pg_catalog.pg_notify('coheld_wake_' || pg_catalog.to_hex(_key), _name)
$$;

CREATE OR REPLACE FUNCTION coheld.tell_VERSION(_loud boolean, _name text) RETURNS void LANGUAGE sql VOLATILE AS $$
    SELECT pg_catalog.pg_notify('coheld_news_' || pg_catalog.to_hex(coheld.news_VERSION(_name)), _name)
        WHERE _loud AND NOT pg_catalog.pg_try_advisory_xact_lock(coheld.news_VERSION(_name))
$$;

-- The lock, if it is free and it is the caller's turn: wait is null then.  state: if it is not the one that is known.
-- watched: the key at which the first of those who wait may sit.
CREATE OR REPLACE FUNCTION coheld.acquire_VERSION(
    _name text, _nonce bytea, _lease bigint, _who bytea, _incarnation bytea, _version bigint,
    _key bigint, _present boolean, _queue boolean, _number bytea,
    OUT token bigint, OUT incarnation bytea, OUT version bigint, OUT created boolean, OUT state bytea, OUT dead bytea,
    OUT wait bigint, OUT holder bytea, OUT watched bigint
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    BOUND CONSTANT bigint := 500000;
    GRACE CONSTANT bigint := 500000;
    f record;
    now bigint;
    until_then bigint;
    gone_since bigint;
    next_one bigint;
    offered int := 0;
    place int := 0;
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
    now := coheld.now_VERSION();
    UPDATE coheld.lock SET  -- most often nobody has it, wants it or has lost it
        g = _nonce, u = now + _lease, w = _who, t = greatest(now, t + 1),
        k = CASE WHEN _present THEN _key END, b = coheld.run_VERSION()
        WHERE name = _name AND g IS NULL AND n IS NULL AND r IS NULL AND i IS NOT NULL AND waiting = '{}'
        RETURNING t, i, v, c, CASE WHEN v <> 0 AND (v <> _version OR i <> _incarnation) THEN s END
        INTO token, incarnation, version, created, state;
    IF FOUND THEN RETURN; END IF;

    LOOP
        SELECT g, u, w, k, b, d, t, i, v, c, r, n, e, waiting INTO f FROM coheld.lock WHERE name = _name FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO coheld.lock (name) VALUES (_name) ON CONFLICT DO NOTHING;
    END LOOP;
    now := coheld.now_VERSION();

    IF f.g IS DISTINCT FROM _nonce THEN
        next_one := f.n;
        IF f.u > now THEN
            until_then := f.u;
            IF f.k IS NOT NULL AND f.b = coheld.run_VERSION() THEN
                IF pg_catalog.pg_try_advisory_xact_lock_shared(f.k) THEN
                    gone_since := least(f.d, now);  -- the clock may have been set back
                    until_then := least(f.u, gone_since + GRACE);
                    IF until_then <= now THEN until_then := NULL; END IF;
                ELSE
                    watched := f.k;
                END IF;
            END IF;
        END IF;
        IF until_then IS NULL AND next_one <> _key AND pg_catalog.cardinality(f.waiting) > 0 THEN
            IF f.e > now AND f.e <= now + BOUND AND next_one = ANY (f.waiting)
                AND NOT pg_catalog.pg_try_advisory_xact_lock_shared(next_one) THEN
                until_then := f.e;
                offered := 1;
            ELSE
                f.waiting := pg_catalog.array_remove(f.waiting, next_one);
                next_one := NULL;
            END IF;
        END IF;
        WHILE until_then IS NULL AND next_one IS DISTINCT FROM _key AND f.waiting[1] <> _key LOOP
            IF pg_catalog.pg_try_advisory_xact_lock_shared(f.waiting[1]) THEN
                f.waiting := f.waiting[2:];
            ELSE
                next_one := f.waiting[1];
                f.e := now + BOUND;
                until_then := f.e;
                offered := 1;
                PERFORM coheld.wake_VERSION(next_one, _name);
            END IF;
        END LOOP;
        IF until_then IS NOT NULL THEN
            IF _queue THEN
                IF _key <> ALL (f.waiting) THEN f.waiting := f.waiting || _key; END IF;
                place := greatest(pg_catalog.array_position(f.waiting, _key) - 1 - offered, 0);
            END IF;
            UPDATE coheld.lock SET d = gone_since, n = next_one, e = f.e, waiting = f.waiting
                WHERE name = _name
                    AND (d, n, e, waiting) IS DISTINCT FROM (gone_since, next_one, f.e, f.waiting);
            wait := until_then - now + BOUND * place + 1000;
            holder := coalesce(f.w, '');
            IF NOT _queue OR place > 0 THEN watched := NULL; END IF;
            RETURN;
        END IF;
        IF f.waiting[1] = _key THEN f.waiting := f.waiting[2:]; END IF;
        IF f.g IS NOT NULL THEN
            f.r := coalesce(f.r, f.w);
            IF f.waiting[1] IS NOT NULL THEN PERFORM coheld.wake_VERSION(f.waiting[1], _name); END IF;  -- it sits here
        END IF;
    END IF;

    token := greatest(now, f.t + 1);
    incarnation := coalesce(f.i, pg_catalog.uuid_send(pg_catalog.gen_random_uuid()));
    UPDATE coheld.lock SET
        g = _nonce, u = now + _lease, w = _who, t = token, i = incarnation, r = f.r, n = NULL, e = NULL,
        k = CASE WHEN _present THEN _key END, b = coheld.run_VERSION(), d = NULL, waiting = f.waiting,
        l = CASE WHEN f.g = _nonce THEN _number ELSE l END  -- what its killed owner had sent, and comes late, is refused
        WHERE name = _name;
    version := f.v;
    created := f.c;
    dead := f.r;
    watched := NULL;
    IF f.v <> 0 AND (f.v <> _version OR incarnation <> _incarnation) THEN
        SELECT s INTO state FROM coheld.lock WHERE name = _name;
    END IF;
END $$;

-- The change is made, and the lock goes back, or its lease begins anew.  Null: another has had it since.
CREATE OR REPLACE FUNCTION coheld.release_VERSION(
    _name text, _nonce bytea, _number bytea, _state bytea, _keep bigint, _loud boolean, _recovered boolean,
    _created boolean, OUT version bigint
) LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    BOUND CONSTANT bigint := 500000;
    f record;
    now bigint;
BEGIN
    IF _state IS NULL AND NOT _recovered AND NOT _created THEN
        PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
    END IF;
    now := coheld.now_VERSION();
    IF _keep IS NULL THEN
        UPDATE coheld.lock SET  -- most often nobody wants it
            g = NULL, u = NULL, w = NULL, k = NULL, b = NULL, d = NULL, l = _number, s = coalesce(_state, s),
            v = CASE WHEN _state IS NULL THEN v ELSE greatest(v + 1, now) END, c = c OR _created,
            r = CASE WHEN NOT _recovered THEN r END
            WHERE name = _name AND g = _nonce AND waiting = '{}' AND NOT coalesce(
                pg_catalog.substr(l, 1, 16) = g AND pg_catalog.substr(l, 17) >= pg_catalog.substr(_number, 17), false)
            RETURNING v INTO version;
        IF FOUND THEN
            IF _loud THEN PERFORM coheld.tell_VERSION(_loud, _name); END IF;
            RETURN;
        END IF;
    END IF;
    SELECT g, v, l, n, e, waiting INTO f FROM coheld.lock WHERE name = _name FOR UPDATE;
    IF f.l = _number THEN
        version := f.v;
        RETURN;
    END IF;
    IF f.g IS DISTINCT FROM _nonce
        OR (pg_catalog.substr(f.l, 1, 16) = f.g AND pg_catalog.substr(f.l, 17) > pg_catalog.substr(_number, 17)) THEN
        RETURN;
    END IF;
    version := CASE WHEN _state IS NULL THEN f.v ELSE greatest(f.v + 1, now) END;
    IF _keep IS NOT NULL THEN
        UPDATE coheld.lock SET
            u = now + _keep, d = NULL, l = _number, v = version, s = coalesce(_state, s), c = c OR _created,
            r = CASE WHEN NOT _recovered THEN r END
            WHERE name = _name;
    ELSE
        WHILE pg_catalog.cardinality(f.waiting) > 0 LOOP
            IF pg_catalog.pg_try_advisory_xact_lock_shared(f.waiting[1]) THEN
                f.waiting := f.waiting[2:];
            ELSE
                f.n := f.waiting[1];
                f.e := now + BOUND;
                PERFORM coheld.wake_VERSION(f.n, _name);
                IF f.waiting[2] IS NOT NULL THEN PERFORM coheld.wake_VERSION(f.waiting[2], _name); END IF;
                EXIT;
            END IF;
        END LOOP;
        UPDATE coheld.lock SET
            g = NULL, u = NULL, w = NULL, k = NULL, b = NULL, d = NULL, n = f.n, e = f.e, waiting = f.waiting,
            l = _number, v = version, s = coalesce(_state, s), c = c OR _created, r = CASE WHEN NOT _recovered THEN r END
            WHERE name = _name;
    END IF;
    PERFORM coheld.tell_VERSION(_loud, _name);
END $$;

-- The lease begins anew.  _durable: with that, all that was granted so far is on the disk.
CREATE OR REPLACE FUNCTION coheld.renew_VERSION(
    _name text, _nonce bytea, _lease bigint, _key bigint, _present boolean, _durable boolean
) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF NOT _durable THEN PERFORM pg_catalog.set_config('synchronous_commit', 'off', true); END IF;
    UPDATE coheld.lock SET
        u = coheld.now_VERSION() + _lease, k = CASE WHEN _present THEN _key END, b = coheld.run_VERSION(), d = NULL
        WHERE name = _name AND g = _nonce;
    RETURN FOUND;
END $$;

-- Who waits keeps its place: the next of them begins anew.
CREATE OR REPLACE FUNCTION coheld.remove_VERSION(_name text, _nonce bytea, _number bytea) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    BOUND CONSTANT bigint := 500000;
    f record;
BEGIN
    SELECT g, l, t, waiting INTO f FROM coheld.lock WHERE name = _name FOR UPDATE;
    IF NOT FOUND OR f.l = _number THEN RETURN true; END IF;
    IF f.g IS DISTINCT FROM _nonce THEN RETURN false; END IF;
    DELETE FROM coheld.lock WHERE name = _name;
    WHILE pg_catalog.cardinality(f.waiting) > 0 LOOP
        IF pg_catalog.pg_try_advisory_xact_lock_shared(f.waiting[1]) THEN
            f.waiting := f.waiting[2:];
        ELSE
            INSERT INTO coheld.lock (name, n, e, l, t, waiting)
                VALUES (_name, f.waiting[1], coheld.now_VERSION() + BOUND, _number, f.t, f.waiting);
            PERFORM coheld.wake_VERSION(f.waiting[1], _name);
            EXIT;
        END IF;
    END LOOP;
    PERFORM coheld.tell_VERSION(true, _name);
    RETURN true;
END $$;

-- The state of the last commit, if it is not the one that is known, and who has the lock.
CREATE OR REPLACE FUNCTION coheld.load_VERSION(
    _name text, _incarnation bytea, _version bigint,
    OUT incarnation bytea, OUT version bigint, OUT state bytea, OUT holder bytea, OUT token bigint, OUT nonce bytea,
    OUT created boolean
) LANGUAGE sql VOLATILE AS $$
    SELECT i, v, CASE WHEN v <> 0 AND (v <> _version OR i <> _incarnation) THEN s END,
        CASE WHEN u > coheld.now_VERSION() THEN w END, t, CASE WHEN u > coheld.now_VERSION() THEN g END, c
        FROM coheld.lock WHERE name = _name
$$;

CREATE OR REPLACE FUNCTION coheld.leave_VERSION(_name text, _key bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    f record;
    first bigint;
BEGIN
    PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
    SELECT g, n, e, waiting INTO f FROM coheld.lock WHERE name = _name FOR UPDATE;
    IF NOT FOUND THEN RETURN true; END IF;
    first := f.waiting[1];
    f.waiting := pg_catalog.array_remove(f.waiting, _key);
    IF f.n = _key THEN
        f.n := NULL;
        f.e := NULL;
    END IF;
    IF first = _key AND f.waiting[1] IS NOT NULL THEN  -- it is in turn, or sits at the holder's key
        PERFORM coheld.wake_VERSION(f.waiting[1], _name);
    END IF;
    UPDATE coheld.lock SET n = f.n, e = f.e, waiting = f.waiting WHERE name = _name;
    RETURN true;
END $$;

-- By the session that listens: its process is here.  A session of before that has the key, as the server does not know
-- yet that its connection is gone, ends.
CREATE OR REPLACE FUNCTION coheld.arrive_VERSION(_key bigint) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    IF NOT pg_catalog.pg_try_advisory_lock(_key) THEN
        PERFORM pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_locks
            WHERE locktype = 'advisory' AND objsubid = 1 AND mode = 'ExclusiveLock' AND granted
                AND (classid::bigint << 32 | objid::bigint) = _key
                AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database());
        PERFORM pg_catalog.pg_advisory_lock(_key);
    END IF;
    EXECUTE pg_catalog.format('LISTEN %I', 'coheld_wake_' || pg_catalog.to_hex(_key));
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION coheld.hear_VERSION(_name text) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_catalog.pg_advisory_lock_shared(coheld.news_VERSION(_name));
    EXECUTE pg_catalog.format('LISTEN %I', 'coheld_news_' || pg_catalog.to_hex(coheld.news_VERSION(_name)));
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION coheld.unhear_VERSION(_name text) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    EXECUTE pg_catalog.format('UNLISTEN %I', 'coheld_news_' || pg_catalog.to_hex(coheld.news_VERSION(_name)));
    PERFORM pg_catalog.pg_advisory_unlock_shared(coheld.news_VERSION(_name));
    RETURN true;
END $$;

-- By who waits first: until the key is free, or for so long.
CREATE OR REPLACE FUNCTION coheld.attend_VERSION(_key bigint, _milliseconds int) RETURNS boolean
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_catalog.set_config('lock_timeout', _milliseconds::text, true);
    PERFORM pg_catalog.pg_advisory_xact_lock_shared(_key);
    RETURN true;
EXCEPTION WHEN lock_not_available THEN
    RETURN false;
END $$;
