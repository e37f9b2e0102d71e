-- Moves members of a second into the notice log. ARGV: now, buckets, partitions, grace, lease, immediate, second, limit,
-- batch id, seconds to the first re-send, then the services.
-- Answers false (no members), {now} (not due), or {more, recorded, body ("" if it was recorded), the seconds to arm, the
-- numbers of the entries whose session a detach has closed}.
local TOKEN_ENDS, SESSION_ENDS = 1, 2

local now = clock(ARGV[1])
open_layout(ARGV[2], ARGV[3], false)
local grace, lease, immediate = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local at, limit = tonumber(ARGV[7]), tonumber(ARGV[8])
if now < at then
  return {text(now)}
end
local second = get_second(at)
if not second.stored then
  return false
end

local names, entries, rearm, closed = {}, {}, {}, {}

local function add_entry(ends, session, field, tail)
  local start = session and session.start
  local head = struct.pack('>I2BBd', #entries, ends, start and 1 or 0, start or 0)
  entries[#entries + 1] = pack_item(head .. pack_field(field) .. tail)
  name_strings(names, issuer_of(field))
end

-- False if it is a member no more: it was moved to another second.
local function claim_token(field)
  local token = get_token(field)
  if not token or token.second ~= at then
    return false
  end
  local ends = TOKEN_ENDS
  local session = token.sid ~= '' and get_session(token.sid) or nil
  if is_live_in(token, session) then
    session.live = session.live - 1
    if session.live == 0 and session.due == 0 then
      ends = ends + SESSION_ENDS
      delete_session(session)
    else
      put_session(session)
    end
  elseif has_closed(token, session) then
    ends = ends + SESSION_ENDS
    closed[#closed + 1] = #entries
    delete_session(session)
  elseif session and session.life ~= token.life then
    session = nil
  end
  delete_token(token)
  name_strings(names, token.client, token.kid)
  add_entry(ends, session, field, token.packed)
  return true
end

local function claim_session(field)
  local session = get_session(field)
  if not session or session.closed or session.due ~= at then
    return false
  end
  local ending = session.has_exp and session.ending or session.ending + grace
  if math.ceil(ending) <= at then
    delete_session(session)
    if session.about ~= '' then
      local client, kid = struct.unpack('>I2I2', session.about)
      name_strings(names, client, kid)
    end
    add_entry(SESSION_ENDS, session, field, struct.pack('>Bd', session.has_exp and 1 or 0, ending) .. session.about)
    return true
  end
  session.due = math.ceil(ending)
  put_session(session)
  add_member(session.due, field)
  if must_arm(session.due, now, lease, immediate) then
    rearm[#rearm + 1] = session.due
  end
  return true
end

local function next_members(most)
  if second.spilled then
    return redis.call('LPOP', tag .. ':l:' .. at, most) or {}
  end
  local taken = {}
  while #second.members > 0 and #taken < most do
    taken[#taken + 1] = table.remove(second.members, 1)
  end
  return taken
end

local taken, seen = 0, 0
second.changed = true

local function count(claimed)
  if claimed then
    taken = taken + 1
    second.count = second.count - 1
  end
end

while taken < limit and seen < 2 * limit do
  local members = next_members(limit - taken)
  if #members == 0 then
    second.count = 0
    break
  end
  seen = seen + #members
  local sessions = {}
  for _, field in ipairs(members) do
    if kind_of(field) == SESSION then
      sessions[#sessions + 1] = field
    else
      count(claim_token(field))
    end
  end
  -- After the tokens, which tell their session's start.
  for _, field in ipairs(sessions) do
    count(claim_session(field))
  end
end
local more = second.count > 0
put_seconds()

local strings = pack_strings(names)
local body = struct.pack('>I4', #strings) .. strings .. table.concat(entries)
local services = {}
for i = 11, #ARGV do
  services[#services + 1] = ARGV[i]
end
local recorded = #entries > 0 and #services > 0
if recorded then
  local live = string.rep('\255', math.floor(#entries / 8))
  if #entries % 8 > 0 then
    live = live .. string.char(2 ^ (#entries % 8) - 1)
  end
  record(ARGV[9], 'e', now, body, live, services, now + tonumber(ARGV[10]))
end
return {more and 1 or 0, recorded and 1 or 0, recorded and '' or body, rearm, closed}
