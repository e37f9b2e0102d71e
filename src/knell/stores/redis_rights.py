"""What each call of the Redis store does, key by key: the stuff of which accounts are made.

A row names keys by what follows their tag, F for the feed's slot and P for a partition's (L: both), and the commands
that run on them. Redis checks what a script runs against the rights of whoever runs the script.
"""

from __future__ import annotations

from collections.abc import Mapping

# Scripts, by their names, and then what runs without one.
RIGHTS: Mapping[str, tuple[str, ...]] = {
    "track": (
        "F:m hget", "F:cn hkeys", "F:y:* exists zrevrange", "F:x zscore", "F:v hget", "P:m hmget hset hincrby",
        "P:i hget hlen hset", "P:j hset", "P:t:* hget hset", "P:s:* hget hset hdel",
        "P:x:* hget hset hdel hlen exists", "P:l:* rpush del", "P:z zadd zrem",
    ),
    "refusals": ("F:m hget", "F:cn hkeys", "F:y:* exists zrevrange", "F:x zscore", "F:v hget"),
    "session": ("P:m hmget", "P:i hget", "P:s:* hget"),
    "live_in_session": ("P:m hmget", "P:i hget", "P:s:* hget"),
    "detach": ("P:m hmget", "P:i hget", "P:j hget", "P:t:* hget hset", "P:d hget hset", "P:s:* hget hset"),
    "attach": ("P:m hmget", "P:i hget", "P:t:* hget hset", "P:d hget hdel", "P:s:* hget hset"),
    "armed": ("P:x:* hget hset",),
    "due": ("P:z zrangebyscore", "P:x:* hkeys"),
    "claim": (
        "P:m hmget", "P:j hget", "P:t:* hget hdel", "P:d hdel", "P:s:* hget hset hdel", "P:z zadd zrem",
        "P:x:* hget hset hdel hlen exists", "P:l:* lpop rpush del", "P:n:* hset", "P:c zadd", "P:o zadd", "P:b incrby",
    ),
    "settle": (
        "P:n:* hmget hget hset hsetnx hkeys hdel del", "P:o zrem", "P:c zrem", "P:b incrby decrby",
    ),
    "revoke": (
        "F:m hget hset hsetnx hincrby", "F:n:* hget hset hkeys exists", "F:v hget hset", "F:s hkeys", "F:p zadd",
        "F:x zadd", "F:y:* zadd", "F:cn hincrby", "F:f xadd", "F:c zadd", "F:o zadd", "F:b incrby", "F:ae hset",
        "F:ai zadd",
    ),
    "undo": (
        "F:m hget hset hincrby", "F:n:* hget hmget hset hkeys hdel del", "F:v hget hdel", "F:s hkeys hexists",
        "F:p zrem", "F:x zrem", "F:y:* zrem", "F:cn hincrby hdel", "F:f xadd", "F:c zadd zrem", "F:o zscore zadd zrem",
        "F:b incrby decrby", "F:ms hget hset", "F:ae hset", "F:ai zadd",
    ),
    "note": ("F:ae hset", "F:ai zadd"),
    "list_audit": ("F:ae hget", "F:ai zrevrangebyscore"),
    "revocation": ("F:v hget",),
    "waiting": ("L:o zrangebyscore",),
    "take": ("L:o zscore zadd", "L:n:* hget hset hincrby hgetall"),
    "resend": ("L:o zadd",),
    "receive": ("L:n:* hmget hget hset hkeys hdel del", "L:o zrem", "L:c zrem", "L:b decrby", "F:ms hdel"),
    "forget": (
        "L:n:* hexists hget hkeys hdel del", "L:o zrange zscore zrem", "L:c zrem", "L:b decrby", "F:ms hdel",
    ),
    "missed": (
        "F:s hexists", "F:ms hget hset", "F:n:* hmget hget hset del", "F:o zscore zadd zrem", "F:c zrem",
        "F:b incrby decrby",
    ),
    "services": ("F:s hgetall", "F:ms hget", "F:n:* hget"),
    "add_service": ("F:s hsetnx", "F:gone srem"),
    "remove_service": ("F:s hdel", "F:gone sadd"),
    "outdated": ("L:c zrange", "L:n:* hmget hkeys"),
    "drop": ("L:n:* hget del", "L:o zrem", "L:c zrem", "L:b decrby"),
    "prune_feed": (
        "F:m hget", "F:v hget hdel", "F:p zrem", "F:x zrangebyscore zrem", "F:y:* zrem", "F:cn hincrby hdel",
        "F:f xlen xtrim",
    ),
    "prune_kept": (
        "F:ks smembers srem", "F:kx:* exists zrangebyscore zrem", "F:k:* del", "F:pa zrangebyscore zrem",
        "F:pd hget hdel", "F:pj hdel", "F:pc hincrby hdel", "F:pk zrem", "F:pk:* zrem", "F:ai zrangebyscore zrem",
        "F:ae hdel",
    ),
    "lease": ("F:le hget hset hdel",),
    "begin": ("F:ks sadd", "F:kx:* zadd zrangebyscore zrem", "F:k:* hmget hset del"),
    "mark": ("F:ks sadd", "F:kx:* zadd", "F:k:* hmget hset"),
    "park": (
        "F:pd hget hset hdel", "F:pj hsetnx hdel", "F:pc hincrby hdel", "F:pk zadd zrem", "F:pk:* zadd zrem",
        "F:pa zadd zrem",
    ),
    "list_parked": ("F:pd hget", "F:pj hget", "F:pk zrangebylex", "F:pk:* zrangebylex"),
    "unpark": ("F:pd hget hdel", "F:pj hdel", "F:pc hincrby hdel", "F:pk zrem", "F:pk:* zrem", "F:pa zrem"),
    # Without a script.
    "head": ("F:m hmget hget hsetnx",),
    "follow": ("F:m hmget hget", "F:f xrange xread", "F:p zrangebyscore", "F:v hmget"),
    "status": ("F:n:* hgetall",),
    "undone": ("F:n:* exists",),
    "count": ("P:j hgetall", "P:t:* hgetall"),
    "claimed": ("P:n:* hget", "P:x:* hexists"),
    "gone": ("F:gone smembers",),
    "prune": ("L:b get", "F:s hkeys"),
}  # fmt: skip

_ISSUER = (
    "head", "track", "refusals", "session", "live_in_session", "count", "armed", "detach", "attach", "revoke", "undo",
    "undone", "note", "revocation", "status", "services", "resend@F",
)  # fmt: skip
_NOTIFIER = (
    "head", "follow", "track", "refusals", "session", "armed", "detach", "attach", "revoke", "undo", "undone", "note",
    "revocation", "status", "services", "resend", "due", "claim", "claimed", "settle", "waiting", "take", "gone",
    "receive", "missed", "park", "prune", "prune_feed", "prune_kept", "outdated", "drop", "lease", "begin", "mark",
)  # fmt: skip
_OPERATOR = (
    *_ISSUER, "follow", "add_service", "remove_service", "forget", "missed", "list_parked", "unpark", "park",
    "list_audit", "due",
)  # fmt: skip
# What an account may call; "@F": in the feed's slot alone.
ROLES: Mapping[str, tuple[str, ...]] = {
    "issuer": _ISSUER,
    "notifier": _NOTIFIER,
    "service": ("begin", "mark"),
    "verifier": ("follow",),
    "operator": _OPERATOR,
}
# These read, whatever they are given.
READS = frozenset(
    {
        "exists", "get", "hexists", "hget", "hgetall", "hkeys", "hlen", "hmget", "smembers", "xlen", "xrange", "xread",
        "zrange", "zrangebylex", "zrangebyscore", "zrevrange", "zrevrangebyscore", "zscore",
    }
)  # fmt: skip
