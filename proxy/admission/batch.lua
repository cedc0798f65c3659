-- One batch of one worker: what it has, and what it wants to have. All or nothing: Redis runs nothing else meanwhile.
--
-- Whatever a worker says of itself is absolute, so that it doesn't matter what was lost on the way, and what is spent only grows, so
-- that it doesn't matter what is said twice. Taking from a bucket is neither; a batch that was given up isn't executed after a
-- newer one.
--
-- ARGV[1]  MessagePack, see `_message` in shared.py
-- KEYS     1 leases     sorted set: incarnation -> ms since 1970 until which it counts
--          2 sequences  hash: incarnation -> number of its last batch
--          then a hash per standing, of what passes:
--            b|KIND  µs since 1970 at which the bucket is full;  c|INCARNATION  requests;  r|ACCOUNT@START|INCARNATION  set aside
--          then a hash per window, of what was spent in it:
--            s|INCARNATION  its total;  sum  of all of them;  seeded|HOST  what that host's ledger says is in it
--
-- What is none of this in these keys is taken for nothing.

local MINUTE, ROUNDING, MOST_OWED = 60e6, 100, 3600e6 -- µs; ROUNDING as in standing.py
local KEPT_MS = 600e3 -- a standing that nobody speaks of; workers repeat what they hold every minute

local message = cmsgpack.unpack(ARGV[1])
local incarnation, sequence, host, lease_ms, leaving, standings, books, plans, asks = unpack(message)

local function integer(number)
  return string.format('%.0f', number)
end

-- A count that was stored; nil for everything else.
local function count(text)
  local number = text and tonumber(text)
  if number and number >= 0 and number < 2 ^ 63 then
    return math.floor(number)
  end
end

-- A command on a key of ours; what isn't of our type there is dropped.
local function call(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  if type(reply) == 'table' and reply.err then
    if not string.find(reply.err, 'WRONGTYPE', 1, true) then
      error(reply.err)
    end
    redis.call('DEL', key)
    reply = redis.call(command, key, ...)
  end
  return reply
end

-- As many arguments as there are; Lua's stack isn't endless.
local function call_all(command, key, arguments)
  for first = 1, #arguments, 1000 do
    call(command, key, unpack(arguments, first, math.min(first + 999, #arguments)))
  end
end

local time = redis.call('TIME')
local now = time[1] * 1e6 + time[2]
local now_ms = math.floor(now / 1000)

-- Leases.
local last = count(call('HGET', KEYS[2], incarnation))
if last and sequence <= last then
  return false
end
local living, leases = {}, 0
local scores = call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #scores, 2 do
  local each, until_ms = scores[i], tonumber(scores[i + 1])
  if until_ms <= now_ms then
    call('ZREM', KEYS[1], each)
    call('HDEL', KEYS[2], each)
  else
    if until_ms > now_ms + lease_ms then -- the clock was put back
      call('ZADD', KEYS[1], integer(now_ms + lease_ms), each)
    end
    living[each] = true
    leases = leases + 1
  end
end
local lapsed = not living[incarnation]
if leaving then
  living[incarnation] = nil
  call('ZREM', KEYS[1], incarnation)
  call('HDEL', KEYS[2], incarnation)
else
  leases = leases + (lapsed and 1 or 0)
  living[incarnation] = true
  call('ZADD', KEYS[1], integer(now_ms + lease_ms), incarnation)
  call('HSET', KEYS[2], incarnation, integer(sequence))
end

-- Standings as they are stored, with what the worker says of itself: {concurrent, limit, {{kind, limit, owed}..}}.
local stand = {}
for i, said in ipairs(standings) do
  local standing = { own = said[1], limit = said[2], elsewhere = 0, reserved = {}, buckets = {}, stale = {}, kept_ms = KEPT_MS }
  local full_at = {}
  local fields = call('HGETALL', KEYS[2 + i])
  for k = 1, #fields, 2 do
    local field, value = fields[k], count(fields[k + 1])
    local kind, name = string.match(field, '^([bcr])|(.*)$')
    local owner = name
    if kind == 'b' then
      full_at[name] = value
    else
      if kind == 'r' then
        name, owner = string.match(name, '^(.-)|(.*)$')
      end
      if not kind or not living[owner] or owner == incarnation then
        standing.stale[field] = true -- our own: unless it is said again below
      elseif kind == 'c' then
        standing.elsewhere = standing.elsewhere + (value or 0)
      else
        standing.reserved[name] = (standing.reserved[name] or 0) + (value or 0)
      end
      if kind == 'r' and owner == incarnation and living[owner] then
        standing.stale[field] = nil -- windows that this batch doesn't name stay as they are
      end
    end
  end
  for k, bucket in ipairs(said[3]) do
    local each = 60e6 / bucket[2]
    local level = math.max(0, (full_at[integer(bucket[1])] or 0) - now) + bucket[3] * each
    standing.buckets[k] = {
      kind = bucket[1],
      limit = bucket[2],
      each = each,
      level = math.max(0, math.min(level, MOST_OWED)), -- µs until it is full
    }
  end
  stand[i] = standing
end

-- Windows: {standing, name, spent, reserved, end_ms, provisional, seeds}; seeds: false or {incarnation, total, ..}.
local windows = {}
for j, said in ipairs(books) do
  local key = KEYS[2 + #standings + j]
  local standing, name, spent, reserved, end_ms, provisional, seeds = unpack(said)
  local own_field = 's|' .. incarnation
  local found = call('HMGET', key, 'seeded|' .. host, own_field, 'sum')
  local own, sum = count(found[2]), count(found[3])
  local changes = {}
  if seeds or not sum or (found[2] and not own) then
    local totals = {}
    local fields = call('HGETALL', key)
    for k = 1, #fields, 2 do
      if string.sub(fields[k], 1, 2) == 's|' then
        totals[fields[k]] = count(fields[k + 1]) or 0
      end
    end
    local new = seeds or {}
    new[#new + 1], new[#new + 2] = incarnation, spent
    for k = 1, #new, 2 do
      local field = 's|' .. new[k]
      if new[k + 1] > (totals[field] or 0) then
        totals[field] = new[k + 1]
        changes[#changes + 1], changes[#changes + 2] = field, integer(new[k + 1])
      end
    end
    sum = 0
    for _, total in pairs(totals) do
      sum = sum + total
    end
    if seeds then
      changes[#changes + 1], changes[#changes + 2] = 'seeded|' .. host, '1'
    end
    if #changes > 0 then
      changes[#changes + 1], changes[#changes + 2] = 'sum', integer(sum)
    end
  elseif spent > (own or 0) then
    sum = sum + spent - (own or 0)
    changes = { own_field, integer(spent), 'sum', integer(sum) }
  end
  if #changes > 0 then
    call_all('HSET', key, changes)
    call('PEXPIREAT', key, integer(end_ms > 0 and end_ms or now_ms + 400 * 86400e3))
  end
  windows[j] = {
    standing = stand[standing],
    field = 'r|' .. name .. '|' .. incarnation,
    known = seeds or found[1] or provisional,
    own = reserved,
    elsewhere = sum - spent + (stand[standing].reserved[name] or 0),
    taken = spent,
  }
end

-- Which limit says no; nil: none. As `Plan.refuse` has it. Plans: {{standing..}, {window, unit, hard..}}.
local function refuse(plan, amounts, costs)
  local accounts = plan[2]
  for k = 1, #accounts, 3 do
    if not windows[accounts[k]].known then
      return -1
    end
  end
  for _, i in ipairs(plan[1]) do
    local standing = stand[i]
    if standing.limit > 0 and standing.own + standing.elsewhere >= standing.limit then
      return { 1, i }
    end
  end
  for k = 1, #accounts, 3 do
    local window, cost, hard = windows[accounts[k]], costs[accounts[k + 1] + 1], accounts[k + 2]
    local used = window.elsewhere + window.taken + window.own
    if hard >= 0 and used + cost > hard then
      return { 2, (k - 1) / 3, used }
    end
  end
  for _, i in ipairs(plan[1]) do
    for k, bucket in ipairs(stand[i].buckets) do
      local over = bucket.level + math.min(amounts[bucket.kind + 1] * bucket.each, MINUTE) - (MINUTE + ROUNDING)
      if over > 0 then
        local left = math.min(bucket.limit, math.max(0, math.floor((MINUTE - bucket.level + ROUNDING) / bucket.each)))
        return { 3, i, k - 1, bucket.limit - left, over }
      end
    end
  end
end

local function take(plan, amounts, costs)
  for _, i in ipairs(plan[1]) do
    local standing = stand[i]
    standing.own = standing.own + (standing.limit > 0 and 1 or 0) -- where nothing is limited nothing is counted
    for _, bucket in ipairs(standing.buckets) do
      bucket.level = bucket.level + math.min(amounts[bucket.kind + 1] * bucket.each, MINUTE)
    end
  end
  for k = 1, #plan[2], 3 do
    local window = windows[plan[2][k]]
    window.own = window.own + costs[plan[2][k + 1] + 1]
  end
end

-- Admissions, one after the other: {plan, amounts, costs}.
local verdicts = {}
for k, ask in ipairs(asks) do
  local plan, amounts, costs = plans[ask[1]], ask[2], ask[3]
  local refusal = refuse(plan, amounts, costs)
  if not refusal then
    take(plan, amounts, costs)
  end
  verdicts[k] = refusal or 0
end

-- What holds now is stored and told.
local told_windows = {}
for j, window in ipairs(windows) do
  local standing = window.standing
  if window.own > 0 and not leaving then
    standing[#standing + 1], standing[#standing + 2] = window.field, integer(window.own)
    standing.stale[window.field] = nil
  else
    standing.stale[window.field] = true
  end
  told_windows[j] = window.known and window.elsewhere or -1
end
local told_standings = {}
for i, standing in ipairs(stand) do
  local told = { standing.elsewhere }
  if standing.own > 0 and not leaving then
    local field = 'c|' .. incarnation
    standing[#standing + 1], standing[#standing + 2] = field, integer(standing.own)
    standing.stale[field] = nil
  end
  for k, bucket in ipairs(standing.buckets) do
    local field = 'b|' .. integer(bucket.kind)
    if bucket.level > 0 then
      standing[#standing + 1], standing[#standing + 2] = field, integer(now + bucket.level)
      standing.kept_ms = math.max(standing.kept_ms, bucket.level / 1000)
    end
    told[k + 1] = bucket.level
  end
  local stale = {}
  for field in pairs(standing.stale) do
    stale[#stale + 1] = field
  end
  call_all('HDEL', KEYS[2 + i], stale)
  if #standing > 0 then
    call_all('HSET', KEYS[2 + i], standing)
    call('PEXPIRE', KEYS[2 + i], integer(standing.kept_ms))
  end
  told_standings[i] = told
end
return cmsgpack.pack({ now, leases, lapsed, verdicts, told_standings, told_windows })
