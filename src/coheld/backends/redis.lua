-- What a Redis or Valkey server does for a lock, each in one step.  Names and values come as KEYS and ARGV, never as text.
--
-- KEYS[1], a hash:
--   g u w   the grant: its nonce, the end of its lease (microseconds of this server's clock), who has it
--   t       the last token
--   i v s   incarnation, number and bytes of the state; c: __create__ has returned
--   r       who lost it without giving it back, until the next has put that right
--   l       the last change, so that one whose answer was lost is not made twice
--   n e     who is in turn, and until when nobody else may have it
--   q       numbers given to those who wait
-- KEYS[2], a sorted set: who waits, in the order of those numbers.
--
-- Whoever waits listens at a channel of its own.  The lock is offered to the first: e is its time to come, and if nobody
-- listens there any more, it is the next one's turn at once.  One that does not come loses its place.

local h, waiting = KEYS[1], KEYS[2]
local BOUND = 500000       -- microseconds for which the lock is kept for who is in turn
local UNUSED = 86400000    -- milliseconds for which a lock without state is remembered

local function text(number) return string.format('%.0f', number) end

local function clock()
    local t = redis.call('TIME')
    return t[1] * 1000000 + t[2]
end

local function offer(now)
    while true do
        local first = redis.call('ZRANGE', waiting, 0, 0)[1]
        if not first then
            redis.call('HDEL', h, 'n', 'e')
            return nil
        end
        redis.call('HSET', h, 'n', first, 'e', text(now + BOUND))
        if redis.call('PUBLISH', 'coheld:wake:' .. first, h) > 0 then return first end
        redis.call('ZREM', waiting, first)
    end
end

local verbs = {}

-- nonce, lease, who, known incarnation, known version, client, queue, new incarnation
-- -> 1, token, incarnation, version, state or nil, dead or nil, created | 0, microseconds, holder
function verbs.acquire(nonce, lease, who, known_i, known_v, client, queue, fresh)
    local now = clock()
    local f = redis.call('HMGET', h, 'g', 'u', 't', 'i', 'v', 'n', 'e', 'r', 'w', 'c')
    local g, u, i, v, n, e = f[1], tonumber(f[2] or 0), f[4], f[5] or '0', f[6], tonumber(f[7] or 0)

    local function refuse(until_then)
        local place = 0
        if queue == '1' then
            if not redis.call('ZSCORE', waiting, client) then
                redis.call('ZADD', waiting, redis.call('HINCRBY', h, 'q', 1), client)
                redis.call('PEXPIRE', waiting, UNUSED)
            end
            place = redis.call('ZRANK', waiting, client)
        end
        return {0, text(math.max(until_then - now, 0) + BOUND * place + 1000), f[9] or ''}
    end

    if g ~= nonce then
        if g and u > now then return refuse(u) end
        if n and n ~= client then
            if e > now and redis.call('ZSCORE', waiting, n) then return refuse(e) end
            redis.call('ZREM', waiting, n)
        end
        if n ~= client then
            local first = redis.call('ZRANGE', waiting, 0, 0)[1]
            if first and first ~= client then
                first = offer(now)
                if first and first ~= client then return refuse(now + BOUND) end
                n = first
            end
        end
    end

    local dead = f[8] or (g and g ~= nonce and f[9]) or false
    local token = math.max((tonumber(f[3]) or 0) + 1, now)
    i = i or fresh
    redis.call('HSET', h, 'i', i, 'g', nonce, 'u', text(now + lease), 't', text(token), 'w', who)
    if dead then redis.call('HSET', h, 'r', dead) end
    if n then redis.call('HDEL', h, 'n', 'e') end
    if queue == '1' or n == client then redis.call('ZREM', waiting, client) end
    if v == '0' and not f[10] then redis.call('PEXPIRE', h, UNUSED + lease / 1000) end
    local state = false
    if v ~= '0' and (i ~= known_i or v ~= known_v) then state = redis.call('HGET', h, 's') end
    return {1, text(token), i, v, state, dead, f[10] and 1 or 0}
end

-- nonce, number of the change, has state, state, lease or '', loud, recovered, created
-- -> version | nil: another has had it since
function verbs.release(nonce, number, has_state, state, lease, loud, recovered, created)
    local f = redis.call('HMGET', h, 'g', 'v', 'l', 'c')
    local v = f[2] or '0'
    if f[3] == number then return v end
    if f[1] ~= nonce then return false end
    local first = v == '0' and not f[4]
    if has_state == '1' then
        v = text(tonumber(v) + 1)
        redis.call('HSET', h, 'l', number, 's', state, 'v', v)
    else
        redis.call('HSET', h, 'l', number)
    end
    if created == '1' then redis.call('HSET', h, 'c', '1') end
    if recovered == '1' then redis.call('HDEL', h, 'r') end
    if first and (has_state == '1' or created == '1') then redis.call('PERSIST', h) end
    if lease ~= '' then
        redis.call('HSET', h, 'u', text(clock() + lease))
    else
        redis.call('HDEL', h, 'g', 'u', 'w')
        if redis.call('EXISTS', waiting) == 1 then offer(clock()) end
    end
    if loud == '1' then redis.call('PUBLISH', 'coheld:news:' .. h, v) end
    return v
end

-- nonce, lease -> 1 | 0: another has had it since
function verbs.renew(nonce, lease)
    if redis.call('HGET', h, 'g') ~= nonce then return 0 end
    redis.call('HSET', h, 'u', text(clock() + lease))
    return 1
end

-- known incarnation, known version -> incarnation, version, state or nil, holder, token
function verbs.load(known_i, known_v)
    local f = redis.call('HMGET', h, 'i', 'v', 'w', 't', 'u')
    local i, v, state = f[1] or '', f[2] or '0', false
    if v ~= '0' and (i ~= known_i or v ~= known_v) then state = redis.call('HGET', h, 's') end
    local held = f[3] and tonumber(f[5] or 0) > clock()
    return {i, v, state, held and f[3] or '', f[4] or '0'}
end

-- client
function verbs.leave(client)
    redis.call('ZREM', waiting, client)
    if redis.call('HGET', h, 'n') == client then
        redis.call('HDEL', h, 'n', 'e')
        if not redis.call('HGET', h, 'g') then offer(clock()) end
    end
    return 1
end

return verbs[table.remove(ARGV, 1)](unpack(ARGV))
