// Capture without packet rules: a connection is led to the proxy when it is made, not when its packets leave, and one from outside is
// given to the proxy's listener before anything looks for another one.
//
//   connect      decides as the rules of ISTIO_OUTPUT do, writes the destination into a slot, and puts the proxy's port there, at a
//                loopback address that names the slot (127.128.0.0/10, for IPv6 a block of this program)
//   getsockopt   answers SO_ORIGINAL_DST on the proxy's socket: its own address names the slot, so the proxy needs no change
//   getpeername  shows the application the peer that it asked for
//   sendmsg, recvmsg  the same for DNS over UDP without a connection
//   classifier   on the pod's interfaces but lo: what comes in for a captured port goes to the listener at the inbound port
//
// Nothing runs between connect and accept. Hooks of netfilter or of sock_ops, which the kernel calls for each packet or step of every
// connection over loopback, would cost more than all of this.
//
// Compiled by the test `ebpf::the_object_is_what_clang_makes_of_the_source` (UPDATE=1 writes capture.o). No header of the
// system is included, so that the object depends on this folder and the compiler only.

#include "kernel.h"

// Addresses are IPv6 everywhere, IPv4 ones in their mapped form; all in network order.
struct place {
	u32 ip[4];
	u16 port;
	u16 turn; // in `slots` only
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
	u8 zero; // always; see `unknown`
	u8 unused[2];
	u32 uid;    // the proxy's first one, or none: -1
	u32 gid;    // as uid
	u32 own_ip; // the pod's first IPv4 address, network order, or 0
	u32 filled; // which lists are worth a look
};

// Bits of `filled`: there are more of the kind than the settings hold themselves.
enum { UIDS = 1, GIDS = 2, GROUPS = 4, LOCALS = 8, EXCLUDED_BLOCKS = 16, CAPTURED_BLOCKS = 32, EXCLUDED_PORTS = 64, CAPTURED_PORTS = 128 };

// One bit a port; the same structure is in src/ebpf/maps.rs.
enum { PORT_WORDS = 1024 };
struct ports {
	u64 excluded[PORT_WORDS];
	u64 captured[PORT_WORDS];
	u64 inbound[PORT_WORDS];
};

// What `listed` and `blocks` hold; the same numbers are in src/ebpf/maps.rs.
enum { UID = 1, GID = 2, GROUP = 3 };
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
	BY_INBOUND_PORT,
	BY_OTHER_PORT,
	NO_LISTENER,
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

struct {
	KIND(MAP_ARRAY);
	ENTRIES(1);
	u32 *key;
	struct ports *value;
} ports SECTION(".maps");

// Where connections were meant to go. Applications call the same few places again and again: the first half of the slots is filled
// once, each with another place, and stays. Whoever calls more places than that gets slots of the second half, which are used in
// turns; the turn is part of the address, so that a slot is never taken for what it held before. The numbers are in src/ebpf/maps.rs.
enum { SLOTS = 1 << 15, LASTING = 1 << 14, TURNS = 1 << 7 };

struct {
	KIND(MAP_ARRAY);
	ENTRIES(SLOTS);
	u32 *key;
	struct place *value;
} slots SECTION(".maps");

// Which of the lasting slots holds a place.
struct {
	KIND(MAP_HASH);
	ENTRIES(LASTING);
	FLAGS(NO_PREALLOC);
	struct place *key;
	u32 *value;
} numbers SECTION(".maps");

// How many lasting slots, and how many turns, were taken.
struct {
	KIND(MAP_ARRAY);
	ENTRIES(2);
	u32 *key;
	u64 *value;
} taken SECTION(".maps");

// Where an application's socket was meant to go, when no lasting slot tells it. Goes with the socket.
struct {
	KIND(MAP_SK_STORAGE);
	FLAGS(NO_PREALLOC);
	s32 *key;
	struct place *value;
} meant SECTION(".maps");

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

// A number that the verifier does not know any more. Else it follows all paths that come after a question once for each answer, which
// for the many questions of `decide` took most of the time that it takes to load the programs.
INLINE u32 unknown(const struct settings *set, u32 number)
{
	u32 zero = set->zero;
	// Here and now, and not where the compiler would rather have it.
	asm volatile("%0 ^= %1" : "+r"(number) : "r"(zero));
	return number;
}

INLINE int in_bits(const u64 *bits, u16 port)
{
	return bits[port >> 6] >> (port & 63) & 1;
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

// fd6f:7574:7269:6767:6572::/96, which a local route leads here; its last 32 bits are as those of IPv4.
enum { V6_FIRST = 0xfd6f7574, V6_SECOND = 0x72696767, V6_THIRD = 0x65720000 };
enum { SLOT_BLOCK = 0x7f800000, SLOT_MASK = 0xffc00000 };

// Whether this is an address that names a slot.
INLINE int names_slot(const struct place *place)
{
	if (!is_mapped(place) && (place->ip[0] != htonl(V6_FIRST) || place->ip[1] != htonl(V6_SECOND) || place->ip[2] != htonl(V6_THIRD)))
		return 0;
	return (place->ip[3] & htonl(SLOT_MASK)) == htonl(SLOT_BLOCK);
}

// What the slot that this address names holds. Not when the slot was used again since.
INLINE int recall(const struct place *address, struct place *to)
{
	u32 number = ntohl(address->ip[3]);
	u32 at = number & (SLOTS - 1);
	u16 turn = number >> 15 & (TURNS - 1);
	struct place *slot = map_lookup(&slots, &at);
	if (!slot || !slot->port || STORE(slot->turn) != turn)
		return 0;
	*to = *slot;
	to->turn = 0;
	return STORE(slot->turn) == turn;
}

// The last 32 bits of an address for this destination; 0 without room for it.
INLINE u32 remember(const struct place *to, struct bpf_sock *sk)
{
	u32 *known = map_lookup(&numbers, to);
	if (known)
		return *known;
	u32 lasting = 0, turns = 1;
	u64 *count = map_lookup(&taken, &lasting);
	if (!count)
		return 0;
	if (STORE(*count) < LASTING) {
		u64 next = __sync_fetch_and_add(count, 1);
		if (next < LASTING) {
			u32 at = next;
			u32 number = htonl(SLOT_BLOCK | at);
			struct place *slot = map_lookup(&slots, &at);
			if (!slot)
				return 0;
			*slot = *to;
			// When another processor was first with the same place, both slots hold it.
			map_update(&numbers, to, &number, NO_EXIST);
			return number;
		}
	}
	count = map_lookup(&taken, &turns);
	if (!count)
		return 0;
	u64 next = __sync_fetch_and_add(count, 1);
	u32 at = LASTING | (next & (LASTING - 1));
	u16 turn = next >> 14 & (TURNS - 1);
	struct place *slot = map_lookup(&slots, &at);
	struct place *kept = sk_storage(&meant, sk, 0, CREATE);
	if (!slot || !kept)
		return 0;
	*kept = *to;
	STORE(slot->turn) = TURNS;
	STORE(slot->ip[0]) = to->ip[0];
	STORE(slot->ip[1]) = to->ip[1];
	STORE(slot->ip[2]) = to->ip[2];
	STORE(slot->ip[3]) = to->ip[3];
	STORE(slot->port) = to->port;
	STORE(slot->turn) = turn;
	return htonl(SLOT_BLOCK | (u32)turn << 15 | at);
}

// The port that this destination is led to, in host order; 0: it is left alone. The questions come in the order of the rules.
INLINE u16 decide(const struct settings *set, const struct ports *ports, const struct place *to, int v4, u32 protocol,
		  int passthrough)
{
	u64 owner = current_uid_gid();
	u32 uid = (u32)owner, gid = (u32)(owner >> 32);
	u16 port = ntohs(to->port);
	u32 reason, led = 0;
	if (!v4 && !set->ipv6)
		return 0;
	int in_loopback = unknown(set, v4 ? (to->ip[3] & set->loopback_mask) == set->loopback
					 : to->ip[0] == 0 && to->ip[1] == 0 && to->ip[2] == 0 && to->ip[3] == htonl(1));
	u32 filled = set->filled;
	int local = unknown(set, in_loopback || (v4 && (to->ip[3] & htonl(0xff000000)) == htonl(0x7f000000)) ||
					(v4 && to->ip[3] == set->own_ip) || ((!v4 || filled & LOCALS) && holds(LOCAL, to)));
	int query = unknown(set, set->dns && port == DNS);
	int by_user = unknown(set, uid == set->uid || (filled & UIDS && has(UID, uid)));
	int by_group = unknown(set, gid == set->gid || (filled & GIDS && has(GID, gid)));
	int in_group = unknown(set, filled & GROUPS && has(GROUP, gid));
	if (filled & EXCLUDED_PORTS && in_bits(ports->excluded, port)) {
		reason = BY_EXCLUDED_PORT;
	} else if (by_user || by_group) {
		// The proxy calls its own pod by its address: in again by the inbound port, but not on its way to the application.
		if (protocol == TCP && local && !in_loopback && !passthrough && port != set->tunnel_port && !(by_user && query)) {
			reason = BY_SELF;
			led = set->inbound_port;
		} else {
			reason = BY_PROXY;
		}
	} else if (local && !set->captures_loopback && !query) {
		reason = BY_LOCAL;
	} else if (set->only_groups ? !in_group : in_group) {
		reason = BY_GROUP;
	} else if (query && (set->dns == 2 || holds(SERVER, to))) {
		reason = BY_DNS;
		led = set->dns_port;
	} else if (protocol == UDP) {
		reason = BY_UDP;
	} else if (in_loopback) {
		reason = BY_LOOPBACK;
	} else if (filled & EXCLUDED_BLOCKS && holds(BLOCK_EXCLUDED, to)) {
		reason = BY_EXCLUDED_BLOCK;
	} else if (filled & CAPTURED_PORTS && in_bits(ports->captured, port)) {
		reason = BY_PORT;
		led = set->proxy_port;
	} else if (set->all_blocks || (filled & CAPTURED_BLOCKS && holds(BLOCK_CAPTURED, to))) {
		reason = BY_BLOCK;
		led = set->proxy_port;
	} else {
		reason = BY_NOTHING;
	}
	count(unknown(set, reason));
	return unknown(set, led);
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
	to->turn = 0;
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
INLINE int lead(struct sock_addr *ctx, int v6, int datagrams)
{
	u32 protocol = datagrams ? UDP : ctx->protocol;
	if (ctx->protocol != UDP && (datagrams || protocol != TCP))
		return ALLOW;
	u32 first = 0;
	struct settings *set = map_lookup(&settings, &first);
	struct ports *bits = map_lookup(&ports, &first);
	if (!set || !bits)
		return REFUSE;
	struct place to;
	read_user(ctx, &to, v6);
	int v4 = v6 ? unknown(set, is_mapped(&to)) : 1;
	u16 port = decide(set, bits, &to, v4, datagrams ? UDP : unknown(set, protocol), unknown(set, passes_through(ctx->sk, v6)));
	if (!datagrams && port && port != set->dns_port) {
		// Without memory for the destination the connection fails; it never goes out uncaptured.
		u32 number = remember(&to, ctx->sk);
		if (!number)
			return REFUSE;
		if (v4) {
			to.ip[3] = number;
		} else {
			to.ip[0] = htonl(V6_FIRST);
			to.ip[1] = htonl(V6_SECOND);
			to.ip[2] = htonl(V6_THIRD);
			to.ip[3] = number;
		}
		to.port = htons(port);
		write_user(ctx, &to, v6);
		return ALLOW;
	}
	struct place *before = sk_storage(&meant, ctx->sk, 0, 0);
	if (!port) {
		// A datagram socket may ask one server after another.
		if (before)
			before->port = 0;
		return ALLOW;
	}
	// The agent's name server listens at one address only, and asks nobody for a destination.
	if (!before)
		before = sk_storage(&meant, ctx->sk, 0, CREATE);
	if (!before)
		return REFUSE;
	*before = to;
	if (v4) {
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
	u32 first = 0;
	struct settings *set = map_lookup(&settings, &first);
	if (!set)
		return ALLOW;
	struct place peer, to;
	read_user(ctx, &peer, v6);
	u16 port = ntohs(peer.port);
	if (port != set->proxy_port && port != set->inbound_port && port != set->dns_port)
		return ALLOW;
	if (names_slot(&peer) && recall(&peer, &to)) {
		write_user(ctx, &to, v6);
		return ALLOW;
	}
	struct place *kept = sk_storage(&meant, ctx->sk, 0, 0);
	if (kept && kept->port)
		write_user(ctx, kept, v6);
	return ALLOW;
}

SECTION("cgroup/connect4") int outrigger_con4(struct sock_addr *ctx) { return lead(ctx, 0, 0); }
SECTION("cgroup/connect6") int outrigger_con6(struct sock_addr *ctx) { return lead(ctx, 1, 0); }
SECTION("cgroup/sendmsg4") int outrigger_snd4(struct sock_addr *ctx) { return lead(ctx, 0, 1); }
SECTION("cgroup/sendmsg6") int outrigger_snd6(struct sock_addr *ctx) { return lead(ctx, 1, 1); }
SECTION("cgroup/recvmsg4") int outrigger_rcv4(struct sock_addr *ctx) { return show(ctx, 0); }
SECTION("cgroup/recvmsg6") int outrigger_rcv6(struct sock_addr *ctx) { return show(ctx, 1); }
SECTION("cgroup/getpeername4") int outrigger_peer4(struct sock_addr *ctx) { return show(ctx, 0); }
SECTION("cgroup/getpeername6") int outrigger_peer6(struct sock_addr *ctx) { return show(ctx, 1); }

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
	u32 first = 0;
	struct settings *set = map_lookup(&settings, &first);
	struct bpf_sock *sk = ctx->sk;
	if (!set || !sk)
		return ALLOW;
	struct place own, meant_for, *to = &meant_for;
	if (LOAD(sk, family) == INET) {
		set_v4(&own, LOAD(sk, src_ip4));
	} else {
		own.ip[0] = LOAD(sk, src_ip6[0]);
		own.ip[1] = LOAD(sk, src_ip6[1]);
		own.ip[2] = LOAD(sk, src_ip6[2]);
		own.ip[3] = LOAD(sk, src_ip6[3]);
	}
	u32 port = LOAD(sk, src_port);
	own.port = htons((u16)port);
	own.turn = 0;
	if (names_slot(&own) && (port == set->proxy_port || port == set->inbound_port)) {
		// A slot that was used again leaves the kernel's answer as it is: there is none.
		if (!recall(&own, to))
			return ALLOW;
	} else if (LOAD(ctx, retval)) {
		// Connection tracking knows nothing of this connection, so nobody translated it: it was meant for where it arrived, whatever
		// port the listener has.
		meant_for = own;
	} else {
		return ALLOW;
	}
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

struct ipv4 {
	u8 version_length;
	u8 service;
	u16 length;
	u16 id;
	u16 fragment;
	u8 ttl;
	u8 protocol;
	u16 checksum;
	u32 from;
	u32 to;
};

struct ipv6 {
	u32 version_flow;
	u16 length;
	u8 next;
	u8 hops;
	u32 from[4];
	u32 to[4];
};

struct tcp {
	u16 from;
	u16 to;
	u32 sequence;
	u32 acknowledged;
	u8 length;
	u8 flags;
};

struct tuple4 {
	u32 from;
	u32 to;
	u16 from_port;
	u16 to_port;
};

struct tuple6 {
	u32 from[4];
	u32 to[4];
	u16 from_port;
	u16 to_port;
};

enum { NEXT = -1, DROP = 2 };
enum { PACKET_HOST = 0, FROM_NETWORK_HEADER = 1, INGRESS = 1 };
enum { ETH_IPV4 = 0x0800, ETH_IPV6 = 0x86dd, ETH_VLAN = 0x8100, ETH_OUTER_VLAN = 0x88a8, ETH_HEADER = 14, VLAN_NUMBER = 0xfff };
enum { HOP_BY_HOP = 0, ROUTING = 43, FRAGMENT = 44, AUTHENTICATION = 51, OPTIONS = 60, MAX_HEADERS = 8 };
enum { FIN = 1, SYN = 2, RST = 4, ACK = 16, TCP_HEADER = 20 };
enum { STATE_TIME_WAIT = 6, STATE_LISTEN = 10 };
#define THIS_NETNS ((u64)-1)
// On a packet that comes in for the second time.
#define AGAIN 0x80000000

// Headers are in the packet's first piece nearly always; whoever sends them otherwise gets no way around this program.
INLINE int load(struct sk_buff *ctx, u32 at, void *to, u32 length)
{
	if (load_relative(ctx, at, to, length, FROM_NETWORK_HEADER) == 0)
		return 1;
	return pull_data(ctx, ctx->len) == 0 && load_relative(ctx, at, to, length, FROM_NETWORK_HEADER) == 0;
}

// A packet's length as its header says. Segments that were put together to more than the field holds (BIG TCP) have 0 there; others
// with 0 the kernel throws away itself.
INLINE u32 whole(const struct sk_buff *ctx, u16 field, u32 header)
{
	return field ? header + ntohs(field) : ctx->len;
}

// A connection is opened from a port whose last connection this side still remembers (TIME_WAIT). The kernel lets the new one replace
// that only on its way to the listener that it finds by itself, which is the application's. So the packet is taken in once more behind
// this one, and this one goes that way as one that ends what it opens, which a listener throws away.
INLINE int forget(struct sk_buff *ctx, u64 start, u32 tcp_at, const struct tcp *tcp)
{
	u64 there = 0;
	u32 link = ETH_HEADER;
	if (load_bytes(ctx, link, &there, sizeof(there)) < 0 || there != start) {
		link = 0;
		if (load_bytes(ctx, link, &there, sizeof(there)) < 0 || there != start)
			return DROP;
	}
	STORE(ctx->mark) = ctx->mark | AGAIN;
	long failed = clone_redirect(ctx, ctx->ifindex, INGRESS);
	STORE(ctx->mark) = ctx->mark & ~AGAIN;
	u8 flags = tcp->flags | FIN;
	u16 from = htons(tcp->length << 8 | tcp->flags), to = htons(tcp->length << 8 | flags);
	if (failed || replace_checksum(ctx, link + tcp_at + 16, from, to, sizeof(to)) < 0 ||
	    store_bytes(ctx, link + tcp_at + 13, &flags, sizeof(flags), 0) < 0)
		return DROP;
	return NEXT;
}

// `tuple`: the packet's addresses and ports, of `size` bytes; `from_port` and `to_port` are in it.
INLINE int steer(struct sk_buff *ctx, u64 start, u32 tcp_at, const struct tcp *tcp, u16 inbound_port, void *tuple, u32 size,
		 u16 *from_port, u16 *to_port)
{
	int opens = (tcp->flags & (SYN | ACK | RST)) == SYN;
	u32 again = ctx->mark & AGAIN;
	if (again)
		STORE(ctx->mark) = ctx->mark & ~AGAIN;
	struct bpf_sock *sk = skc_lookup_tcp(ctx, tuple, size, THIS_NETNS, 0);
	if (sk) {
		u32 state = sk->state;
		int known = state != STATE_LISTEN && !(state == STATE_TIME_WAIT && opens);
		// Saves the kernel looking for it once more.
		if (known)
			sk_assign(ctx, sk, 0);
		sk_release(sk);
		if (known)
			return NEXT;
		if (state == STATE_TIME_WAIT && !again)
			return forget(ctx, start, tcp_at, tcp);
	}
	// From nowhere: a connection of the same client to the inbound port itself must not be found.
	*from_port = 0;
	*to_port = htons(inbound_port);
	sk = skc_lookup_tcp(ctx, tuple, size, THIS_NETNS, 0);
	if (!sk) {
		count(NO_LISTENER);
		return DROP;
	}
	int given = sk->state == STATE_LISTEN && sk_assign(ctx, sk, 0) == 0;
	sk_release(sk);
	if (!given)
		return DROP;
	if (opens)
		count(BY_INBOUND_PORT);
	return NEXT;
}

SECTION("classifier") int outrigger_in(struct sk_buff *ctx)
{
	u32 first = 0, tcp_at = 0, length = 0, fragment = 0;
	u64 start = 0;
	struct tcp tcp;
	struct tuple4 v4;
	struct tuple6 v6;
	struct settings *set = map_lookup(&settings, &first);
	struct ports *bits = map_lookup(&ports, &first);
	if (!set || !bits)
		return DROP;
	if (ctx->pkt_type != PACKET_HOST)
		return NEXT;
	if (ctx->vlan_present) {
		// What is for a VLAN comes by an interface of its own. Number 0 is none, and the kernel takes such tags off, one after another.
		if (ctx->vlan_tci & VLAN_NUMBER)
			return NEXT;
		if (ctx->protocol == htons(ETH_VLAN) || ctx->protocol == htons(ETH_OUTER_VLAN))
			return DROP;
	}
	int is_v4 = ctx->protocol == htons(ETH_IPV4);
	if (is_v4) {
		struct ipv4 ip;
		if (!load(ctx, 0, &ip, sizeof(ip)))
			return DROP;
		if (ip.protocol != TCP || ntohs(ip.fragment) & 0x1fff)
			return NEXT;
		fragment = ntohs(ip.fragment) & 0x2000;
		tcp_at = (ip.version_length & 15) * 4;
		length = whole(ctx, ip.length, 0);
		v4.from = ip.from;
		v4.to = ip.to;
		// Addresses that name slots are for connections that start here; to others they are nobody's.
		if ((ip.to & htonl(SLOT_MASK)) == htonl(SLOT_BLOCK))
			return DROP;
	} else if (ctx->protocol == htons(ETH_IPV6) && set->ipv6) {
		struct ipv6 ip;
		if (!load(ctx, 0, &ip, sizeof(ip)))
			return DROP;
		if (ip.to[0] == htonl(V6_FIRST) && ip.to[1] == htonl(V6_SECOND) && ip.to[2] == htonl(V6_THIRD))
			return DROP;
		u8 next = ip.next;
		tcp_at = sizeof(ip);
		length = whole(ctx, ip.length, sizeof(ip));
#pragma unroll
		for (int i = 0; i < MAX_HEADERS; i++) {
			u8 head[4];
			if (next != HOP_BY_HOP && next != ROUTING && next != OPTIONS && next != AUTHENTICATION && next != FRAGMENT)
				break;
			if (!load(ctx, tcp_at, head, sizeof(head)))
				return DROP;
			if (next == FRAGMENT) {
				// Only the first piece has the ports; without it the others are nothing.
				if (head[2] || head[3] & 0xf8)
					return NEXT;
				fragment = head[3] & 1;
				tcp_at += 8;
			} else {
				tcp_at += next == AUTHENTICATION ? (head[1] + 2) * 4 : (head[1] + 1) * 8;
			}
			next = head[0];
		}
		if (next == HOP_BY_HOP || next == ROUTING || next == OPTIONS || next == AUTHENTICATION || next == FRAGMENT)
			return DROP;
		if (next != TCP)
			return NEXT;
		v6.from[0] = ip.from[0];
		v6.from[1] = ip.from[1];
		v6.from[2] = ip.from[2];
		v6.from[3] = ip.from[3];
		v6.to[0] = ip.to[0];
		v6.to[1] = ip.to[1];
		v6.to[2] = ip.to[2];
		v6.to[3] = ip.to[3];
	} else {
		return NEXT;
	}
	if (length < tcp_at + TCP_HEADER || !load(ctx, tcp_at, &tcp, sizeof(tcp)))
		return DROP;
	int opens = (tcp.flags & (SYN | ACK | RST)) == SYN;
	if (!in_bits(bits->inbound, ntohs(tcp.to))) {
		if (opens)
			count(BY_OTHER_PORT);
		return NEXT;
	}
	// Put together again it would find its listener without this program. Nobody sends an opening packet in pieces.
	if (fragment)
		return opens ? DROP : NEXT;
	if (!load(ctx, 0, &start, sizeof(start)))
		return DROP;
	if (is_v4) {
		v4.from_port = tcp.from;
		v4.to_port = tcp.to;
		return steer(ctx, start, tcp_at, &tcp, set->inbound_port, &v4, sizeof(v4), &v4.from_port, &v4.to_port);
	}
	v6.from_port = tcp.from;
	v6.to_port = tcp.to;
	return steer(ctx, start, tcp_at, &tcp, set->inbound_port, &v6, sizeof(v6), &v6.from_port, &v6.to_port);
}

char _license[] SECTION("license") = "Dual MIT/GPL";
