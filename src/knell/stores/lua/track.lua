-- Records tokens, in their order. ARGV: now, buckets, partitions, grace, lease, immediate, continuing, the call's mark, the
-- feed's tag, the mark of the names of claims that the deny keys were made with ("-": not to be compared), number of deny
-- keys, the deny keys, number of strings, the strings, then each token packed.
-- Answers {0, what is denied}, and has changed nothing, if anything is under the deny keys; {2, mark, names} if other names
-- of claims are to be looked for as well. Else {1}, then for each token:
-- 1 if its session has ended, the seconds to arm (0: none), and its session's start ("" if not known).
local UUID_JTI, HAS_SID, UUID_SID, HAS_EXP_CLAIM, HAS_START, REFUSED = 1, 2, 4, 8, 16, 32

local now = clock(ARGV[1])
local grace, lease, immediate, mark = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[8])
local continuing = ARGV[7] == '1'

-- A number of arguments, then so many of them, and where the next one is.
local function read_arguments(at)
  local last = at + tonumber(ARGV[at])
  return {unpack(ARGV, at + 1, last)}, last + 1
end

local deny_keys, strings, first
deny_keys, first = read_arguments(11)
local news = ARGV[10] ~= '-' and news_of_names(ARGV[9], ARGV[10])
if news then
  return {2, news[1], news[2]}
end
local hits = look(ARGV[9], deny_keys, now)
if #hits > 0 then
  return {0, hits}
end
strings, first = read_arguments(first)
open_layout(ARGV[2], ARGV[3], true)

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

local function session_of(token)
  return token.sid ~= '' and get_session(token.sid) or nil
end

-- Whether its session's end hangs on a token's own entry.
local function carries_end(token, session)
  return has_closed(token, session) or (is_live_in(token, session) and session.live == 1 and session.due == 0)
end

-- Takes a token out of its session, which goes with its last one.
local function leave(token)
  local session = session_of(token)
  if carries_end(token, session) then
    delete_session(session)
  elseif is_live_in(token, session) then
    session.live = session.live - 1
    put_session(session)
  end
end

local life
local function open_session(key, field, ending, has_exp)
  life = life or new_life()
  return {
    key = key, field = field, life = life, live = 0, ending = ending, has_exp = has_exp, due = 0, about = '', closer = '',
  }
end

-- Lets a token carry its session on.
local function extend(session, start, about, exp, session_exp)
  if session_exp then
    session.ending = session.has_exp and math.max(session.ending, session_exp) or session_exp
    session.has_exp = true
  elseif not session.has_exp then
    session.ending = math.max(session.ending, exp)
  end
  if not session.start or session.about == '' then
    session.about = about
  end
  session.start = session.start or start
  if session.due == 0 and (session.has_exp or grace > 0) then
    session.due = math.ceil(session.has_exp and session.ending or session.ending + grace)
    add_member(session.due, session.field)
  end
end

local function arm(second)
  return must_arm(second, now, lease, immediate, mark) and second or 0
end

local function track(packed)
  local flags, issuer, client, kid, second, exp, session_exp, start, jti, sid, about, rest, claims =
    struct.unpack('>BI2I2I2I5dddI2c0I2c0I2c0I2c0I2c0', packed)
  local refused = bit.band(flags, REFUSED) ~= 0
  session_exp = bit.band(flags, HAS_EXP_CLAIM) ~= 0 and session_exp or nil
  start = bit.band(flags, HAS_START) ~= 0 and start or nil
  local session, session_key
  local session_field = ''
  if bit.band(flags, HAS_SID) ~= 0 then
    session_field = make_field(number_of(issuer), SESSION, bit.band(flags, UUID_SID) / UUID_SID, sid)
    session, session_key = get_session(session_field)
    session = session and not session.closed and session or nil
    if continuing and not session and not refused then
      return {1, 0, 0, ''}
    end
  end
  if refused then
    return {0, 0, 0, pack_start(session)}
  end
  local field = make_field(number_of(issuer), 0, bit.band(flags, UUID_JTI), jti)
  local token, token_key = get_token(field)
  if not token or token.second ~= second then
    if token then
      remove_member(token.second, field)
    end
    add_member(second, field)
  end
  local client_number, client_literal = number_or_literal(client)
  local kid_number, kid_literal = number_or_literal(kid)
  local arm_session = 0
  -- One that is being revoked stays what it is to its session.
  if not token or token.detached == 0 then
    local counted = token and token.sid == session_field and is_live_in(token, session)
    if token and not counted then
      leave(token)
    end
    token = {key = token_key, field = field, detached = 0, life = 0, sid = session_field}
    if session_field ~= '' then
      session = session or open_session(session_key, session_field, session_exp or exp, session_exp ~= nil)
      local named = struct.pack('>I2I2', client_number, kid_number) .. about .. client_literal .. kid_literal .. claims
      extend(session, start, named, exp, session_exp)
      session.live = session.live + (counted and 0 or 1)
      put_session(session)
      token.life = session.life
      arm_session = session.due ~= 0 and arm(session.due) or 0
    end
  end
  token.second, token.client, token.kid = second, client_number, kid_number
  token.rest = rest .. client_literal .. kid_literal .. claims
  put_token(token)
  return {0, arm(second), arm_session, pack_start(session)}
end

local answer = {1}
for i = first, #ARGV do
  answer[#answer + 1] = track(ARGV[i])
end
put_seconds()
return answer
