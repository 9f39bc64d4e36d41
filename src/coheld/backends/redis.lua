-- What a Redis or Valkey server does for a lock, each verb in one step.  Names and values come as KEYS and ARGV, never as
-- text.  A script is the first part of this file and the part of its verb.
--
-- KEYS[1], a hash:
--   g u w   the grant: its nonce, the end of its lease (microseconds of this server's clock), who has it
--   t       the last token
--   i v s   incarnation, number and bytes of the state; c: __create__ has returned.  The number is of the clock: after the
--           last writes were lost, none is given again that a host knows another state by
--   r       who lost it without giving it back, until the next has put that right
--   l       the last change, so that one whose answer was lost is not made twice: a nonce, and digits that grow
--   n e     who is in turn, and until when nobody else may have it
--   q       numbers given to those who wait
-- KEYS[2], a sorted set: who waits, in the order of those numbers.
--
-- Whoever waits listens at a channel of its own.  The lock is offered to the first: e is its time to come, and if nobody
-- listens there any more, it is the next one's turn at once.  One that does not come loses its place; who is behind it
-- hears of the offer as well, so that it looks when that is over.
--
-- Most of the time of a script is its calls of the server, and what is defined in it: both are few.

local h, waiting = KEYS[1], KEYS[2]
local call, text = redis.call, string.format

-- ==== acquire: nonce, lease, who, known incarnation, known version, client, queue, number of the ask
-- -> "token incarnation version created", or with state and the dead one behind | microseconds, holder
local BOUND, UNUSED = 500000, 86400000
local nonce, client, queue = ARGV[1], ARGV[6], ARGV[7]
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local f = call('HMGET', h, 'g', 'u', 't', 'i', 'v', 'n', 'c', 'r')
local g, i, v, n, created, dead = f[1], f[4], f[5] or '0', f[6], f[7], f[8]

if g ~= nonce then
    local first, until_then, offered = call('ZRANGE', waiting, 0, 0)[1], nil, 0
    if g and tonumber(f[2]) > now then
        until_then = tonumber(f[2])
    elseif n and n ~= client and first then
        local e = tonumber(call('HGET', h, 'e') or 0)
        if e > now and call('ZSCORE', waiting, n) then
            until_then, offered = e, 1
        else
            call('ZREM', waiting, n)
            first = call('ZRANGE', waiting, 0, 0)[1]
        end
    end
    while not until_then and n ~= client and first and first ~= client do
        call('HSET', h, 'n', first, 'e', text('%.0f', now + BOUND))
        if call('PUBLISH', 'coheld:wake:' .. first, h) > 0 then
            until_then, offered = now + BOUND, 1
        else
            call('ZREM', waiting, first)
            first = call('ZRANGE', waiting, 0, 0)[1]
        end
    end
    if until_then then
        local place = 0
        if queue == '1' then
            if not call('ZSCORE', waiting, client) then
                call('ZADD', waiting, call('HINCRBY', h, 'q', 1), client)
                call('PEXPIRE', waiting, UNUSED)
            end
            place = math.max(call('ZRANK', waiting, client) - offered, 0)
        end
        return {text('%.0f', until_then - now + BOUND * place + 1000), call('HGET', h, 'w') or ''}
    end
    if g then dead = dead or call('HGET', h, 'w') end
    if n then call('HDEL', h, 'n', 'e') end
    if first == client then call('ZREM', waiting, client) end
end

local token = now
if f[3] and tonumber(f[3]) >= now then token = f[3] + 1 end
token = text('%.0f', token)
i = i or token
call('HSET', h, 'g', nonce, 'u', text('%.0f', now + ARGV[2]), 't', token, 'w', ARGV[3], 'i', i)
if g == nonce then call('HSET', h, 'l', ARGV[8]) end -- what its killed owner had sent, and comes late, is refused
if dead and dead ~= f[8] then call('HSET', h, 'r', dead) end
if v == '0' and not created then call('PEXPIRE', h, math.ceil(UNUSED + ARGV[2] / 1000)) end
local answer = token .. ' ' .. i .. ' ' .. v .. (created and ' 1' or ' 0')
local stale = v ~= '0' and (v ~= ARGV[5] or i ~= ARGV[4])
if stale or dead then return {answer, stale and call('HGET', h, 's'), dead} end
return answer

-- ==== release: nonce, number of the change, has state, state, lease or '', loud, recovered, created
-- -> version | nil: another has had it since
local BOUND = 500000
local f = call('HMGET', h, 'g', 'v', 'l', 'c')
local v = f[2] or '0'
if f[3] == ARGV[2] then return v end
if f[1] ~= ARGV[1] then return false end
if f[3] and f[3]:sub(1, 16) == f[1] and f[3]:sub(17) > ARGV[2]:sub(17) then return false end

local clock
local function now()
    if not clock then
        local t = call('TIME')
        clock = t[1] * 1000000 + t[2]
    end
    return clock
end

local first_state = v == '0' and not f[4] and (ARGV[3] == '1' or ARGV[8] == '1')
if ARGV[3] == '1' then
    v = text('%.0f', math.max(v + 1, now()))
    call('HSET', h, 'l', ARGV[2], 's', ARGV[4], 'v', v)
else
    call('HSET', h, 'l', ARGV[2])
end
if ARGV[8] == '1' then call('HSET', h, 'c', '1') end
if ARGV[7] == '1' then call('HDEL', h, 'r') end
if first_state then call('PERSIST', h) end
if ARGV[5] ~= '' then
    call('HSET', h, 'u', text('%.0f', now() + ARGV[5]))
else
    call('HDEL', h, 'g', 'u', 'w')
    local first = call('ZRANGE', waiting, 0, 1)
    while first[1] do
        call('HSET', h, 'n', first[1], 'e', text('%.0f', now() + BOUND))
        if call('PUBLISH', 'coheld:wake:' .. first[1], h) > 0 then
            if first[2] then call('PUBLISH', 'coheld:wake:' .. first[2], h) end
            break
        end
        call('ZREM', waiting, first[1])
        first = call('ZRANGE', waiting, 0, 1)
    end
end
if ARGV[6] == '1' then call('PUBLISH', 'coheld:news:' .. h, v) end
return v

-- ==== renew: nonce, lease
-- -> 1 | 0: another has had it since
local UNUSED = 86400000
if call('HGET', h, 'g') ~= ARGV[1] then return 0 end
local t = call('TIME')
call('HSET', h, 'u', text('%.0f', t[1] * 1000000 + t[2] + ARGV[2]))
if call('TTL', h) >= 0 then call('PEXPIRE', h, math.ceil(UNUSED + ARGV[2] / 1000)) end
return 1

-- ==== remove: nonce, number of the change
-- -> 1 | 0: another has had it since.  Who waits keeps its place: the next of them begins anew
local BOUND, UNUSED = 500000, 86400000
local f = call('HMGET', h, 'g', 'l', 't', 'q')
if f[2] == ARGV[2] then return 1 end
if f[1] ~= ARGV[1] then return 1 - call('EXISTS', h) end
call('DEL', h)
local first = call('ZRANGE', waiting, 0, 0)[1]
while first do
    local t = call('TIME')
    call('HSET', h, 'n', first, 'e', text('%.0f', t[1] * 1000000 + t[2] + BOUND), 'l', ARGV[2], 't', f[3], 'q', f[4])
    call('PEXPIRE', h, UNUSED)
    if call('PUBLISH', 'coheld:wake:' .. first, h) > 0 then break end
    call('ZREM', waiting, first)
    first = call('ZRANGE', waiting, 0, 0)[1]
end
if not first then call('DEL', h) end
call('PUBLISH', 'coheld:news:' .. h, '0')
return 1

-- ==== load: known incarnation, known version
-- -> incarnation, version, state or nil, holder, token, nonce, created
local f = call('HMGET', h, 'i', 'v', 'w', 't', 'u', 'g', 'c')
local i, v, state, t = f[1] or '', f[2] or '0', false, call('TIME')
if v ~= '0' and (i ~= ARGV[1] or v ~= ARGV[2]) then state = call('HGET', h, 's') end
local held = f[3] and tonumber(f[5] or 0) > t[1] * 1000000 + t[2]
return {i, v, state, held and f[3] or '', f[4] or '0', held and f[6] or '', f[7] and 1 or 0}

-- ==== leave: client
call('ZREM', waiting, ARGV[1])
if call('HGET', h, 'n') == ARGV[1] then
    call('HDEL', h, 'n', 'e')
    local first = call('ZRANGE', waiting, 0, 0)[1]
    if first and not call('HGET', h, 'g') then call('PUBLISH', 'coheld:wake:' .. first, h) end
end
return 1
