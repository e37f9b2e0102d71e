-- The audit log.    :ae  id -> entry    :ai  ids by when
local function note(id, at, entry)
  redis.call('HSET', tag .. ':ae', id, entry)
  redis.call('ZADD', tag .. ':ai', at, id)
end
