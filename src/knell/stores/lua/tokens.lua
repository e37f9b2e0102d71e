-- The tokens, sessions and expiry seconds of one partition.
--   :m  the layout: buckets, partitions, lives opened
--   :i  string -> small number    :j  small number -> string    (issuers, clients, keys)
--   :t:<bucket>  tokens    :s:<bucket>  sessions    :d  detached tokens
--   :x:<block of 64 seconds>  the seconds that have members    :z  the blocks    :l:<second>  members that did not fit
-- A token or session is named by its field: varint(issuer * 4 + kind * 2 + is a UUID), then the id.
local BLOCK = 64
-- Longer values make a hash leave its compact encoding (the server's default hash-max-listpack-value).
local COMPACT = 64
-- Clients and keys beyond this many distinct strings are written out, so that the table stays bounded.
local MOST_STRINGS = 16000
local LITERAL = 65535
local SESSION = 1
local LEASED, CONFIRMED, SPILLED = 1, 2, 4

local buckets

local function open_layout(default_buckets, partitions, create)
  local found = redis.call('HMGET', tag .. ':m', 'buckets', 'partitions')
  if found[1] then
    if found[2] ~= partitions then
      error({err = 'KNELLLAYOUT ' .. found[2]})
    end
    buckets = tonumber(found[1])
    return
  end
  buckets = tonumber(default_buckets)
  if create then
    redis.call('HSET', tag .. ':m', 'buckets', default_buckets, 'partitions', partitions)
  end
end

local function new_life()
  return redis.call('HINCRBY', tag .. ':m', 'lives', 1) % 65536
end

local function known(name)
  local found = redis.call('HGET', tag .. ':i', name)
  return found and tonumber(found)
end

local function intern(name)
  local found = known(name)
  if not found then
    found = redis.call('HLEN', tag .. ':i') + 1
    redis.call('HSET', tag .. ':i', name, found)
    redis.call('HSET', tag .. ':j', found, name)
  end
  return found
end

local function varint(number)
  local out = ''
  while number >= 128 do
    out = out .. string.char(number % 128 + 128)
    number = math.floor(number / 128)
  end
  return out .. string.char(number)
end

local function make_field(issuer, kind, uuid, id)
  return varint(issuer * 4 + kind * 2 + uuid) .. id
end

local function kind_of(field)
  return bit.band(string.byte(field, 1), 2) / 2
end

local function issuer_of(field)
  local number, scale, i = 0, 1, 1
  while true do
    local byte = string.byte(field, i)
    number = number + byte % 128 * scale
    if byte < 128 then
      return math.floor(number / 4)
    end
    scale, i = scale * 128, i + 1
  end
end

-- A field of up to 258 bytes with its length before it.
local function pack_field(field)
  if #field < 255 then
    return string.char(#field) .. field
  end
  return struct.pack('>BI2', 255, #field) .. field
end

local function unpack_field(from, at)
  local size = string.byte(from, at)
  at = at + 1
  if size == 255 then
    size, at = struct.unpack('>I2', from, at)
  end
  return string.sub(from, at, at + size - 1), at + size
end

local function bucket(field)
  local hash = 0
  for i = 1, #field do
    hash = (hash * 65599 + string.byte(field, i)) % 4294967291
  end
  return hash % buckets
end

-- Tokens.

local function get_token(field)
  local key = tag .. ':t:' .. bucket(field)
  local packed = redis.call('HGET', key, field)
  if not packed then
    return nil, key
  end
  local token = {key = key, field = field, packed = packed}
  local at
  token.detached, token.second, token.life, token.client, token.kid, at = struct.unpack('>BI5I2I2I2', packed)
  token.sid, at = unpack_field(packed, at)
  token.rest = string.sub(packed, at)
  return token, key
end

local function put_token(token)
  token.packed = struct.pack('>BI5I2I2I2', token.detached, token.second, token.life, token.client, token.kid)
    .. pack_field(token.sid) .. token.rest
  redis.call('HSET', token.key, token.field, token.packed)
end

local function delete_token(token)
  redis.call('HDEL', token.key, token.field)
  if token.detached == 1 then
    redis.call('HDEL', tag .. ':d', token.field)
  end
end

-- Sessions. `ending` is its session_exp if has_exp, else the last exp seen; `due` the second of its own entry, 0 if none;
-- `about` what that entry tells of the token that told the start; `closer` the token whose detaching closed it.

local CLOSED, STARTED, HAS_EXP, DUE_AT_END, HAS_DUE, HAS_ABOUT = 1, 2, 4, 8, 16, 32

local function parse_session(packed)
  local flags, life, live, ending, at = struct.unpack('>BI2I3d', packed)
  local session = {life = life, live = live, ending = ending, due = 0, about = ''}
  session.closed = bit.band(flags, CLOSED) ~= 0
  session.has_exp = bit.band(flags, HAS_EXP) ~= 0
  if bit.band(flags, STARTED) ~= 0 then
    session.start, at = struct.unpack('>d', packed, at)
  end
  if bit.band(flags, DUE_AT_END) ~= 0 then
    session.due = math.ceil(ending)
  elseif bit.band(flags, HAS_DUE) ~= 0 then
    session.due, at = struct.unpack('>I5', packed, at)
  end
  if bit.band(flags, HAS_ABOUT) ~= 0 then
    session.about, at = unpack_field(packed, at)
  end
  session.closer = string.sub(packed, at)
  return session
end

local function get_session(field)
  local key = tag .. ':s:' .. bucket(field)
  local packed = redis.call('HGET', key, field)
  local session = packed and parse_session(packed) or nil
  if session then
    session.key, session.field = key, field
  end
  return session, key
end

local function put_session(session)
  local flags, tail = 0, ''
  if session.closed then flags = flags + CLOSED end
  if session.has_exp then flags = flags + HAS_EXP end
  if session.start then
    flags, tail = flags + STARTED, struct.pack('>d', session.start)
  end
  if session.due ~= 0 and session.due == math.ceil(session.ending) then
    flags = flags + DUE_AT_END
  elseif session.due ~= 0 then
    flags, tail = flags + HAS_DUE, tail .. struct.pack('>I5', session.due)
  end
  -- Where the start is a whole second a later entry needs it as well: an iat decides what a cut-off says of it.
  if session.about ~= '' and (session.due ~= 0 or session.start == math.floor(session.start or 0.5)) then
    flags, tail = flags + HAS_ABOUT, tail .. pack_field(session.about)
  end
  local head = struct.pack('>BI2I3d', flags, session.life, session.live, session.ending)
  redis.call('HSET', session.key, session.field, head .. tail .. session.closer)
end

local function delete_session(session)
  redis.call('HDEL', session.key, session.field)
end

local function pack_start(session)
  return session and session.start and struct.pack('>d', session.start) or ''
end

-- Of a token and its session's record (nil if there is none).

local function is_live_in(token, session)
  return session and not session.closed and token.detached == 0 and token.life == session.life
end

local function has_closed(token, session)
  return session and session.closed and session.closer == token.field
end

-- Seconds. A value is a byte of state, 8 bytes of lease if leased (until when, and a call's mark), then the members, or
-- their number if they spilled over into a list. What was moved out of a spilled second stays in its list until it is popped: its record then names another
-- second, and it does not count.

local seconds = {}

local function get_second(at)
  local second = seconds[at]
  if second then
    return second
  end
  second = {at = at, block = math.floor(at / BLOCK), name = at % BLOCK, lease = 0, count = 0, members = {}}
  second.key = tag .. ':x:' .. second.block
  seconds[at] = second
  local packed = redis.call('HGET', second.key, second.name)
  if not packed then
    return second
  end
  second.stored = true
  local state, from = string.byte(packed, 1), 2
  second.confirmed = bit.band(state, CONFIRMED) ~= 0
  second.spilled = bit.band(state, SPILLED) ~= 0
  if bit.band(state, LEASED) ~= 0 then
    second.lease, second.mark, from = struct.unpack('>I6I2', packed, from)
  end
  if second.spilled then
    second.count = struct.unpack('>I4', packed, from)
    return second
  end
  while from <= #packed do
    second.members[#second.members + 1], from = unpack_field(packed, from)
  end
  second.count = #second.members
  return second
end

local function add_member(at, field)
  local second = get_second(at)
  second.members[#second.members + 1] = field
  second.count = second.count + 1
  second.changed = true
  return second
end

local function remove_member(at, field)
  local second = get_second(at)
  second.count = second.count - 1
  second.changed = true
  for i, member in ipairs(second.members) do
    if member == field then
      table.remove(second.members, i)
      return
    end
  end
end

local function put_second(second)
  local list = tag .. ':l:' .. second.at
  if second.count <= 0 then
    redis.call('HDEL', second.key, second.name)
    if second.spilled then
      redis.call('DEL', list)
    end
    if redis.call('EXISTS', second.key) == 0 then
      redis.call('ZREM', tag .. ':z', second.block)
    end
    return
  end
  local head, state = '', 0
  if second.confirmed then
    state = CONFIRMED
  elseif second.lease > 0 then
    state, head = LEASED, struct.pack('>I6I2', second.lease, second.mark)
  end
  local inline = {}
  local size = 1 + #head
  if not second.spilled then
    for i, member in ipairs(second.members) do
      inline[i] = pack_field(member)
      size = size + #inline[i]
    end
    second.spilled = size > COMPACT
  end
  local packed
  if second.spilled then
    packed = string.char(state + SPILLED) .. head .. struct.pack('>I4', second.count)
    for from = 1, #second.members, 1000 do
      redis.call('RPUSH', list, unpack(second.members, from, math.min(from + 999, #second.members)))
    end
  else
    packed = string.char(state) .. head .. table.concat(inline)
  end
  redis.call('HSET', second.key, second.name, packed)
  if not second.stored and redis.call('HLEN', second.key) == 1 then
    redis.call('ZADD', tag .. ':z', second.block, second.block)
  end
end

local function put_seconds()
  for _, second in pairs(seconds) do
    if second.changed then
      put_second(second)
    end
  end
end

-- True once in a call for a second that has no timer: the caller is to publish one. By its `mark`, if it has one (not 0),
-- a call knows its own lease when it is sent again because the answer that told of the lease was lost.
local function must_arm(at, now, lease, immediate, mark)
  local second = get_second(at)
  if second.asked then
    return false
  end
  second.asked = true
  local leased = second.lease > now * 1000 and second.mark ~= mark
  if at - now > immediate and (second.confirmed or leased) then
    return false
  end
  if not second.confirmed then
    second.lease, second.mark = math.floor((now + lease) * 1000), mark or 0
    second.changed = true
  end
  return true
end

-- The strings that an answer refers to by number: 4 bytes of number, 2 of length, the string, and so on.

local function name_strings(names, ...)
  for _, number in ipairs({...}) do
    if number > 0 and number < LITERAL and not names[number] then
      names[number] = redis.call('HGET', tag .. ':j', number)
    end
  end
end

local function pack_strings(names)
  local packed = {}
  for number, name in pairs(names) do
    packed[#packed + 1] = struct.pack('>I4', number) .. pack_item(name)
  end
  return table.concat(packed)
end
