-- Takes back what `track` did with tokens that the denylist refuses, last one first. ARGV: buckets, partitions, then for
-- each token: issuer, UUID flag, jti, its second, what became of it, its session's record after and before.
local COUNTED = 2

open_layout(ARGV[1], ARGV[2], false)

local function leave(session)
  session.live = session.live - 1
  if session.live <= 0 and session.due == 0 then
    delete_session(session)
  else
    put_session(session)
  end
end

local function restore(session, before, token, counted)
  if before == '' then
    if session.due ~= 0 then
      remove_member(session.due, session.field)
    end
    delete_session(session)
    return
  end
  local earlier = parse_session(before)
  earlier.key, earlier.field = session.key, session.field
  if session.due ~= earlier.due and session.due ~= 0 then
    remove_member(session.due, session.field)
  end
  if counted then
    leave(earlier)
  elseif earlier.closed and earlier.closer == token.field then
    delete_session(session)
  else
    put_session(earlier)
  end
end

for i = 3, #ARGV, 7 do
  local issuer = known(ARGV[i])
  local token = issuer and get_token(make_field(issuer, 0, tonumber(ARGV[i + 1]), ARGV[i + 2]))
  if token and token.second == tonumber(ARGV[i + 3]) then
    remove_member(token.second, token.field)
    delete_token(token)
    local session = token.sid ~= '' and get_session(token.sid)
    if session and session.packed == ARGV[i + 5] then
      restore(session, ARGV[i + 6], token, bit.band(tonumber(ARGV[i + 4]), COUNTED) ~= 0)
    elseif is_live_in(token, session) then
      leave(session)
    end
  end
end
put_seconds()
return 1
