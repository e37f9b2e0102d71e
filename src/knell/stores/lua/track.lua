-- Records tokens. ARGV: now, buckets, partitions, grace, lease, immediate, continuing, number of strings, the strings,
-- then each token packed. Answers now, then for each token: what became of it, the seconds to arm (0: none), and its
-- session's record after and before.
local ENDED, COUNTED = 1, 2
local UUID_JTI, HAS_SID, UUID_SID, HAS_EXP_CLAIM, HAS_START = 1, 2, 4, 8, 16

local now = clock(ARGV[1])
open_layout(ARGV[2], ARGV[3], true)
local grace, lease, immediate = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local continuing = ARGV[7] == '1'
local strings = {}
local first = 9 + tonumber(ARGV[8])
for i = 9, first - 1 do
  strings[#strings + 1] = ARGV[i]
end

local numbers = {}
local function number_of(index)
  if not numbers[index] then
    numbers[index] = intern(strings[index])
  end
  return numbers[index]
end

-- A client or key: its number, or LITERAL with the string itself when the table is full.
local function number_or_literal(index)
  if index == 0 then
    return 0, ''
  end
  local number = numbers[index] or known(strings[index])
  if not number and redis.call('HLEN', tag .. ':i') < MOST_STRINGS then
    number = intern(strings[index])
  end
  if number and number < LITERAL then
    numbers[index] = number
    return number, ''
  end
  return LITERAL, pack_item(strings[index])
end

local life
local function open_session(key, field, start, ending, has_exp)
  life = life or new_life()
  return {
    key = key, field = field, life = life, live = 0, start = start,
    ending = ending, has_exp = has_exp, due = 0, subject = '', closer = '',
  }
end

-- Takes the token's earlier record out. True if it counts as a live token of `session` already.
local function take_out(old, session, second)
  if old.second ~= second then
    remove_member(old.second, old.field)
  end
  if old.detached == 1 then
    redis.call('HDEL', tag .. ':d', old.field)
    local closed = old.sid ~= '' and get_session(old.sid)
    if closed and closed.closer == old.field and (not session or session.field ~= old.sid) then
      delete_session(closed)
    end
    return false
  end
  if old.sid == '' then
    return false
  end
  if session and session.field == old.sid then
    return is_live_in(old, session)
  end
  local left = get_session(old.sid)
  if is_live_in(old, left) then
    left.live = left.live - 1
    if left.live == 0 and left.due == 0 then
      delete_session(left)
    else
      put_session(left)
    end
  end
  return false
end

local function track(packed)
  local flags, issuer, client, kid, second, exp, session_exp, start, jti, sid, subject, rest =
    struct.unpack('>BI2I2I2I5dddI2c0I2c0I2c0I2c0', packed)
  local has_exp = bit.band(flags, HAS_EXP_CLAIM) ~= 0
  if bit.band(flags, HAS_START) == 0 then
    start = nil
  end
  local session, session_key, session_field
  if bit.band(flags, HAS_SID) ~= 0 then
    session_field = make_field(number_of(issuer), SESSION, bit.band(flags, UUID_SID) / UUID_SID, sid)
    session, session_key = get_session(session_field)
    if continuing and (not session or session.closed) then
      return {ENDED, 0, 0, '', ''}
    end
  end
  local field = make_field(number_of(issuer), 0, bit.band(flags, UUID_JTI), jti)
  local old, token_key = get_token(field)
  local counted = old and take_out(old, session, second)
  if not old or old.second ~= second then
    add_member(second, field)
  end
  local before, arm_session = session and session.packed or '', false
  local token = {key = token_key, field = field, detached = 0, second = second, life = 0, sid = session_field or ''}
  if session_field then
    if not session or session.closed then
      session = open_session(session_key, session_field, start, has_exp and session_exp or exp, has_exp)
    elseif has_exp then
      session.ending = session.has_exp and math.max(session.ending, session_exp) or session_exp
      session.has_exp = true
    elseif not session.has_exp then
      session.ending = math.max(session.ending, exp)
    end
    session.start = session.start or start
    session.subject = session.subject ~= '' and session.subject or subject
    if not counted then
      session.live = session.live + 1
    end
    if session.due == 0 and (session.has_exp or grace > 0) then
      session.due = math.ceil(session.has_exp and session.ending or session.ending + grace)
      add_member(session.due, session_field)
    end
    put_session(session)
    token.life = session.life
    arm_session = session.due ~= 0 and must_arm(session.due, now, lease, immediate)
  end
  local client_literal, kid_literal
  token.client, client_literal = number_or_literal(client)
  token.kid, kid_literal = number_or_literal(kid)
  token.rest = rest .. client_literal .. kid_literal
  put_token(token)
  return {
    counted and COUNTED or 0,
    must_arm(second, now, lease, immediate) and second or 0,
    arm_session and session.due or 0,
    session_field and session.packed or '',
    before,
  }
end

local answer = {text(now)}
for i = first, #ARGV do
  answer[#answer + 1] = track(ARGV[i])
end
put_seconds()
return answer
