-- Applies receipts. ARGV: now, margin (s), then for each: service, batch id, bitmaps of done, parked and retrying, until.
local now, margin = clock(ARGV[1]), tonumber(ARGV[2])

local function intersection(one, other)
  return combine(one, other, bit.band)
end

local function set_state(key, service, state)
  redis.call('HSET', key, 's:' .. service, state .. ' ' .. text(now))
end

local function receive(service, batch, done, parked, retrying, till)
  local key = record_key(batch)
  local found = redis.call('HMGET', key, 'k', 'l', 'w:' .. service, 's:' .. service)
  local kind, live, part, state = found[1], found[2], found[3], found[4]
  if not kind then
    return
  end
  local is_done = not is_empty(intersection(done, live))
  if not part then
    if is_done and state and string.sub(state, 1, 6) == 'parked' then
      set_state(key, service, 'done')
    end
    return
  end
  local hold, closed = struct.unpack('>d', part), string.sub(part, 9)
  closed = union(closed, intersection(union(done, parked), live))
  local open = without(live, closed)
  local retries = not is_empty(intersection(retrying, open))
  if retries then
    hold = (till ~= '' and tonumber(till) or now) + margin
  end
  if kind == 'r' and is_empty(open) then
    set_state(key, service, is_done and 'done' or 'parked')
  elseif kind == 'r' and retries then
    set_state(key, service, 'retrying')
  end
  if is_empty(open) then
    close_part(batch, kind, service)
  else
    redis.call('HSET', key, 'w:' .. service, pack_part(closed, hold))
  end
end

for i = 3, #ARGV, 6 do
  receive(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5])
end
return 1
