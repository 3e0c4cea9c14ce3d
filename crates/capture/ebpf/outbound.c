// Outbound capture without packet rules: a connection is led to the proxy when it is made, not when its packets leave.
//
//   connect      decides as the rules of ISTIO_OUTPUT do, remembers the destination with the socket, puts the proxy's address there
//   sock_ops     before the first packet: client's address and port -> destination; when the proxy's side of the connection is
//                established the destination moves to that socket
//   getsockopt   answers SO_ORIGINAL_DST on the proxy's socket from there, so the proxy needs no change
//   getpeername  shows the application the peer that it asked for
//   sendmsg, recvmsg  the same for DNS over UDP without a connection
//
// Compiled by the test `ebpf::the_object_is_what_clang_makes_of_the_source` (UPDATE=1 writes outbound.o). No header is included, so
// that the object depends on this file and the compiler only; the context structures are those of the kernel's stable interface.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define ENTRIES(n) int(*max_entries)[n]
#define KIND(n) int(*type)[n]
#define FLAGS(n) int(*map_flags)[n]
// The verifier refuses an access to a context through an address that was computed, so the compiler must not merge such accesses:
// stores are volatile, loads of alternative fields are written as the instruction.
#define STORE(field) (*(volatile __typeof__(field) *)&(field))
#define LOAD(ctx, field)                                                                                               \
	({                                                                                                             \
		u64 loaded;                                                                                            \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                                                  \
			     : "=r"(loaded)                                                                            \
			     : "r"(ctx), "i"(__builtin_offsetof(__typeof__(*(ctx)), field)));                          \
		(u32)loaded;                                                                                           \
	})
#define htons(n) ((u16)__builtin_bswap16(n))
#define ntohs(n) ((u16)__builtin_bswap16(n))
#define htonl(n) __builtin_bswap32(n)
#define ntohl(n) __builtin_bswap32(n)

enum { MAP_HASH = 1, MAP_ARRAY = 2, MAP_LRU_HASH = 9, MAP_LPM_TRIE = 11, MAP_SK_STORAGE = 24 };
enum { NO_PREALLOC = 1, CREATE = 1 };
enum { ALLOW = 1, REFUSE = 0 };
enum { INET = 2, INET6 = 10, TCP = 6, UDP = 17, SOL_IP = 0, SOL_IPV6 = 41, ORIGINAL_DST = 80, DNS = 53 };
enum { OP_CONNECT = 3, OP_PASSIVE_ESTABLISHED = 5 };

struct bpf_sock {
	u32 bound_dev_if;
	u32 family;
	u32 type;
	u32 protocol;
	u32 mark;
	u32 priority;
	u32 src_ip4;
	u32 src_ip6[4];
};

struct sock_addr {
	u32 user_family;
	u32 user_ip4;
	u32 user_ip6[4];
	u32 user_port;
	u32 family;
	u32 type;
	u32 protocol;
	u32 msg_src_ip4;
	u32 msg_src_ip6[4];
	struct bpf_sock *sk __attribute__((aligned(8)));
};

struct sock_ops {
	u32 op;
	u32 args[4];
	u32 family;
	u32 remote_ip4;
	u32 local_ip4;
	u32 remote_ip6[4];
	u32 local_ip6[4];
	u32 remote_port; // network order, in the upper half
	u32 local_port;	 // host order
	u32 unused[24];
	u64 bytes[2];
	struct bpf_sock *sk;
};

struct sockopt {
	struct bpf_sock *sk;
	void *optval;
	void *optval_end;
	s32 level;
	s32 optname;
	s32 optlen;
	s32 retval;
};

static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*map_update)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*map_delete)(void *map, const void *key) = (void *)3;
static u64 (*current_uid_gid)(void) = (void *)15;
static void *(*sk_storage)(void *map, void *sk, void *value, u64 flags) = (void *)107;

// Addresses are IPv6 everywhere, IPv4 ones in their mapped form; all in network order.
struct place {
	u32 ip[4];
	u16 port;
	u16 unused;
};

struct flow {
	struct place client;
	struct place proxy;
};

// The same structure is in src/ebpf/maps.rs.
struct settings {
	u32 loopback;	   // network order
	u32 loopback_mask; // network order
	u16 proxy_port;	   // host order, as the next three
	u16 dns_port;
	u16 inbound_port;
	u16 tunnel_port;
	u8 dns;		      // 0 off, 1 the listed servers, 2 all
	u8 captures_loopback; // the destination list holds a loopback block
	u8 all_blocks;
	u8 only_groups;
	u8 ipv6;
	u8 unused[3];
};

// What `listed` and `blocks` hold; the same numbers are in src/ebpf/maps.rs.
enum { UID = 1, GID = 2, GROUP = 3, PORT_EXCLUDED = 4, PORT_CAPTURED = 5 };
enum { LOCAL = 1, BLOCK_EXCLUDED = 2, BLOCK_CAPTURED = 3, SERVER = 4 };

// Why a connection goes where it goes, in the order of the questions; names are in src/ebpf/maps.rs.
enum {
	BY_EXCLUDED_PORT,
	BY_SELF,
	BY_PROXY,
	BY_LOCAL,
	BY_GROUP,
	BY_DNS,
	BY_UDP,
	BY_LOOPBACK,
	BY_EXCLUDED_BLOCK,
	BY_PORT,
	BY_BLOCK,
	BY_NOTHING,
	TOLD_PROXY,
	REASONS
};

struct listed_key {
	u32 kind;
	u32 value;
};

struct block_key {
	u32 prefix;
	u32 kind;
	u32 ip[4];
};

struct {
	KIND(MAP_ARRAY);
	ENTRIES(1);
	u32 *key;
	struct settings *value;
} settings SECTION(".maps");

struct {
	KIND(MAP_HASH);
	ENTRIES(1024);
	FLAGS(NO_PREALLOC);
	struct listed_key *key;
	u8 *value;
} listed SECTION(".maps");

struct {
	KIND(MAP_LPM_TRIE);
	ENTRIES(1024);
	FLAGS(NO_PREALLOC);
	struct block_key *key;
	u8 *value;
} blocks SECTION(".maps");

struct {
	KIND(MAP_ARRAY);
	ENTRIES(REASONS);
	u32 *key;
	u64 *value;
} counters SECTION(".maps");

// Connections between their first packet and their establishment.
struct {
	KIND(MAP_LRU_HASH);
	ENTRIES(4096);
	struct flow *key;
	struct place *value;
} flows SECTION(".maps");

// Where an application's socket was meant to go. Goes with the socket.
struct {
	KIND(MAP_SK_STORAGE);
	FLAGS(NO_PREALLOC);
	s32 *key;
	struct place *value;
} meant SECTION(".maps");

// Where a connection that the proxy accepted was meant to go. Goes with the socket.
struct {
	KIND(MAP_SK_STORAGE);
	FLAGS(NO_PREALLOC);
	s32 *key;
	struct place *value;
} accepted SECTION(".maps");

INLINE void count(u32 reason)
{
	u64 *counter = map_lookup(&counters, &reason);
	if (counter)
		__sync_fetch_and_add(counter, 1);
}

INLINE int has(u32 kind, u32 value)
{
	struct listed_key key = { kind, value };
	return map_lookup(&listed, &key) != 0;
}

INLINE int holds(u32 kind, const struct place *to)
{
	struct block_key key = { 160, kind, { to->ip[0], to->ip[1], to->ip[2], to->ip[3] } };
	return map_lookup(&blocks, &key) != 0;
}

INLINE int is_mapped(const struct place *place)
{
	return place->ip[0] == 0 && place->ip[1] == 0 && place->ip[2] == htonl(0xffff);
}

INLINE void set_v4(struct place *place, u32 ip)
{
	place->ip[0] = place->ip[1] = 0;
	place->ip[2] = htonl(0xffff);
	place->ip[3] = ip;
}

// The port that this destination is led to, in host order; 0: it is left alone. The questions come in the order of the rules.
INLINE u16 decide(const struct settings *set, const struct place *to, u32 protocol, int passthrough)
{
	u64 owner = current_uid_gid();
	u32 uid = (u32)owner, gid = (u32)(owner >> 32);
	u16 port = ntohs(to->port);
	u32 reason;
	int v4 = is_mapped(to);
	if (!v4 && !set->ipv6)
		return 0;
	int in_loopback = v4 ? (to->ip[3] & set->loopback_mask) == set->loopback
			     : to->ip[0] == 0 && to->ip[1] == 0 && to->ip[2] == 0 && to->ip[3] == htonl(1);
	int local = in_loopback || (v4 && (to->ip[3] & htonl(0xff000000)) == htonl(0x7f000000)) || holds(LOCAL, to);
	int query = set->dns && port == DNS;
	int by_user = has(UID, uid);
	if (has(PORT_EXCLUDED, port)) {
		reason = BY_EXCLUDED_PORT;
	} else if (by_user || has(GID, gid)) {
		// The proxy calls its own pod by its address: in again by the inbound port, but not on its way to the application.
		if (protocol == TCP && local && !in_loopback && !passthrough && port != set->tunnel_port && !(by_user && query)) {
			count(BY_SELF);
			return set->inbound_port;
		}
		reason = BY_PROXY;
	} else if (local && !set->captures_loopback && !query) {
		reason = BY_LOCAL;
	} else if (set->only_groups ? !has(GROUP, gid) : has(GROUP, gid)) {
		reason = BY_GROUP;
	} else if (query && (set->dns == 2 || holds(SERVER, to))) {
		count(BY_DNS);
		return set->dns_port;
	} else if (protocol == UDP) {
		reason = BY_UDP;
	} else if (in_loopback) {
		reason = BY_LOOPBACK;
	} else if (holds(BLOCK_EXCLUDED, to)) {
		reason = BY_EXCLUDED_BLOCK;
	} else if (has(PORT_CAPTURED, port)) {
		count(BY_PORT);
		return set->proxy_port;
	} else if (set->all_blocks || holds(BLOCK_CAPTURED, to)) {
		count(BY_BLOCK);
		return set->proxy_port;
	} else {
		reason = BY_NOTHING;
	}
	count(reason);
	return 0;
}

INLINE void read_user(struct sock_addr *ctx, struct place *to, int v6)
{
	if (v6) {
		to->ip[0] = LOAD(ctx, user_ip6[0]);
		to->ip[1] = LOAD(ctx, user_ip6[1]);
		to->ip[2] = LOAD(ctx, user_ip6[2]);
		to->ip[3] = LOAD(ctx, user_ip6[3]);
	} else {
		set_v4(to, LOAD(ctx, user_ip4));
	}
	to->port = (u16)LOAD(ctx, user_port);
	to->unused = 0;
}

INLINE void write_user(struct sock_addr *ctx, const struct place *to, int v6)
{
	if (v6) {
		STORE(ctx->user_ip6[0]) = to->ip[0];
		STORE(ctx->user_ip6[1]) = to->ip[1];
		STORE(ctx->user_ip6[2]) = to->ip[2];
		STORE(ctx->user_ip6[3]) = to->ip[3];
	} else {
		STORE(ctx->user_ip4) = to->ip[3];
	}
	STORE(ctx->user_port) = to->port;
}

// The socket is bound to 127.0.0.6 or ::6, which the proxy uses to call the application behind it.
INLINE int passes_through(struct bpf_sock *sk, int v6)
{
	if (!v6)
		return sk->src_ip4 == htonl(0x7f000006);
	if (sk->src_ip6[0] || sk->src_ip6[1])
		return 0;
	return sk->src_ip6[2] ? sk->src_ip6[2] == htonl(0xffff) && sk->src_ip6[3] == htonl(0x7f000006)
			      : sk->src_ip6[3] == htonl(6);
}

// connect and sendmsg: leads the destination to this pod's own address when it is captured.
INLINE int lead(struct sock_addr *ctx, int v6)
{
	u32 protocol = ctx->protocol;
	if (protocol != TCP && protocol != UDP)
		return ALLOW;
	u32 first = 0;
	struct settings *set = map_lookup(&settings, &first);
	if (!set)
		return REFUSE;
	struct place to;
	read_user(ctx, &to, v6);
	u16 port = decide(set, &to, protocol, passes_through(ctx->sk, v6));
	struct place *before = sk_storage(&meant, ctx->sk, 0, 0);
	if (!port) {
		// A datagram socket may ask one server after another.
		if (before)
			before->port = 0;
		return ALLOW;
	}
	if (!before)
		before = sk_storage(&meant, ctx->sk, 0, CREATE);
	// Without memory for the destination the connection fails; it never goes out uncaptured.
	if (!before)
		return REFUSE;
	*before = to;
	if (is_mapped(&to)) {
		set_v4(&to, htonl(0x7f000001));
	} else {
		to.ip[0] = to.ip[1] = to.ip[2] = 0;
		to.ip[3] = htonl(1);
	}
	to.port = htons(port);
	write_user(ctx, &to, v6);
	return ALLOW;
}

// getpeername and recvmsg: the address that the application used.
INLINE int show(struct sock_addr *ctx, int v6)
{
	struct place *to = sk_storage(&meant, ctx->sk, 0, 0);
	u32 first = 0;
	struct settings *set = map_lookup(&settings, &first);
	if (!to || !to->port || !set)
		return ALLOW;
	u16 port = ntohs((u16)ctx->user_port);
	if (port == set->proxy_port || port == set->inbound_port || port == set->dns_port)
		write_user(ctx, to, v6);
	return ALLOW;
}

SECTION("cgroup/connect4") int outrigger_con4(struct sock_addr *ctx) { return lead(ctx, 0); }
SECTION("cgroup/connect6") int outrigger_con6(struct sock_addr *ctx) { return lead(ctx, 1); }
SECTION("cgroup/sendmsg4") int outrigger_snd4(struct sock_addr *ctx) { return lead(ctx, 0); }
SECTION("cgroup/sendmsg6") int outrigger_snd6(struct sock_addr *ctx) { return lead(ctx, 1); }
SECTION("cgroup/recvmsg4") int outrigger_rcv4(struct sock_addr *ctx) { return show(ctx, 0); }
SECTION("cgroup/recvmsg6") int outrigger_rcv6(struct sock_addr *ctx) { return show(ctx, 1); }
SECTION("cgroup/getpeername4") int outrigger_peer4(struct sock_addr *ctx) { return show(ctx, 0); }
SECTION("cgroup/getpeername6") int outrigger_peer6(struct sock_addr *ctx) { return show(ctx, 1); }

INLINE void read_flow(struct sock_ops *ctx, struct place *local, struct place *remote)
{
	if (LOAD(ctx, family) == INET) {
		set_v4(local, LOAD(ctx, local_ip4));
		set_v4(remote, LOAD(ctx, remote_ip4));
	} else {
		local->ip[0] = LOAD(ctx, local_ip6[0]);
		local->ip[1] = LOAD(ctx, local_ip6[1]);
		local->ip[2] = LOAD(ctx, local_ip6[2]);
		local->ip[3] = LOAD(ctx, local_ip6[3]);
		remote->ip[0] = LOAD(ctx, remote_ip6[0]);
		remote->ip[1] = LOAD(ctx, remote_ip6[1]);
		remote->ip[2] = LOAD(ctx, remote_ip6[2]);
		remote->ip[3] = LOAD(ctx, remote_ip6[3]);
	}
	local->port = htons((u16)LOAD(ctx, local_port));
	remote->port = htons((u16)ntohl(LOAD(ctx, remote_port)));
	local->unused = remote->unused = 0;
}

SECTION("sockops") int outrigger_flow(struct sock_ops *ctx)
{
	struct flow flow;
	struct bpf_sock *sk = ctx->sk;
	if (!sk)
		return ALLOW;
	if (ctx->op == OP_CONNECT) {
		struct place *to = sk_storage(&meant, sk, 0, 0);
		if (!to || !to->port)
			return ALLOW;
		struct place copy = *to;
		read_flow(ctx, &flow.client, &flow.proxy);
		map_update(&flows, &flow, &copy, 0);
	} else if (ctx->op == OP_PASSIVE_ESTABLISHED) {
		read_flow(ctx, &flow.proxy, &flow.client);
		struct place *to = map_lookup(&flows, &flow);
		if (!to)
			return ALLOW;
		struct place copy = *to;
		struct place *kept = sk_storage(&accepted, sk, 0, CREATE);
		if (kept)
			*kept = copy;
		map_delete(&flows, &flow);
	}
	return ALLOW;
}

struct sockaddr4 {
	u16 family;
	u16 port;
	u32 ip;
	u64 zero;
} __attribute__((packed));

struct sockaddr6 {
	u16 family;
	u16 port;
	u32 flow;
	u32 ip[4];
	u32 scope;
} __attribute__((packed));

INLINE void answer(struct sockopt *ctx, s32 length)
{
	// Two stores: the verifier refuses the one store of eight bytes that the compiler would make of them.
	STORE(ctx->optlen) = length;
	STORE(ctx->retval) = 0;
	count(TOLD_PROXY);
}

SECTION("cgroup/getsockopt") int outrigger_orig(struct sockopt *ctx)
{
	if (ctx->optname != ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		return ALLOW;
	struct place *to = sk_storage(&accepted, ctx->sk, 0, 0);
	if (!to)
		return ALLOW;
	if (ctx->level == SOL_IP && is_mapped(to)) {
		struct sockaddr4 *out = ctx->optval;
		if ((void *)(out + 1) > ctx->optval_end)
			return ALLOW;
		out->family = INET;
		out->port = to->port;
		out->ip = to->ip[3];
		out->zero = 0;
		answer(ctx, sizeof(*out));
	} else if (ctx->level == SOL_IPV6 && !is_mapped(to)) {
		struct sockaddr6 *out = ctx->optval;
		if ((void *)(out + 1) > ctx->optval_end)
			return ALLOW;
		out->family = INET6;
		out->port = to->port;
		out->flow = 0;
		out->ip[0] = to->ip[0];
		out->ip[1] = to->ip[1];
		out->ip[2] = to->ip[2];
		out->ip[3] = to->ip[3];
		out->scope = 0;
		answer(ctx, sizeof(*out));
	}
	return ALLOW;
}

char _license[] SECTION("license") = "Dual MIT/GPL";
