// What the programs share with the kernel: the contexts of its stable interface, and its functions by their numbers.

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

enum { MAP_HASH = 1, MAP_ARRAY = 2, MAP_LPM_TRIE = 11, MAP_SK_STORAGE = 24 };
enum { NO_PREALLOC = 1, CREATE = 1, NO_EXIST = 1 };
enum { ALLOW = 1, REFUSE = 0 };
enum { INET = 2, INET6 = 10, TCP = 6, UDP = 17, SOL_IP = 0, SOL_IPV6 = 41, ORIGINAL_DST = 80, DNS = 53 };

struct bpf_sock {
	u32 bound_dev_if;
	u32 family;
	u32 type;
	u32 protocol;
	u32 mark;
	u32 priority;
	u32 src_ip4;
	u32 src_ip6[4];
	u32 src_port; // host order
	u16 dst_port; // network order
	u16 unused;
	u32 dst_ip4;
	u32 dst_ip6[4];
	u32 state;
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
static u64 (*current_uid_gid)(void) = (void *)15;
static void *(*sk_storage)(void *map, void *sk, void *value, u64 flags) = (void *)107;

struct sk_buff {
	u32 len;
	u32 pkt_type;
	u32 mark;
	u32 queue_mapping;
	u32 protocol;
	u32 vlan_present;
	u32 vlan_tci;
	u32 vlan_proto;
	u32 priority;
	u32 ingress_ifindex;
	u32 ifindex;
};

static long (*store_bytes)(struct sk_buff *, u32 at, const void *from, u32 length, u64 flags) = (void *)9;
static long (*replace_checksum)(struct sk_buff *, u32 at, u64 from, u64 to, u64 flags) = (void *)11;
static long (*clone_redirect)(struct sk_buff *, u32 interface, u64 flags) = (void *)13;
static long (*load_bytes)(struct sk_buff *, u32 at, void *to, u32 length) = (void *)26;
static long (*pull_data)(struct sk_buff *, u32 length) = (void *)39;
static long (*load_relative)(struct sk_buff *, u32 at, void *to, u32 length, u32 start) = (void *)68;
static long (*sk_release)(void *sk) = (void *)86;
static void *(*skc_lookup_tcp)(struct sk_buff *, const void *tuple, u32 size, u64 netns, u64 flags) = (void *)99;
static long (*sk_assign)(struct sk_buff *, void *sk, u64 flags) = (void *)124;
