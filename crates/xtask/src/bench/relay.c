/* relay LISTEN UPSTREAM: moves bytes between ports of this machine and does nothing else, with the fewest system calls that
 * sockets allow. What it costs is the kernel's part of any proxy over sockets: nothing above it can cost less. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DESCRIPTORS = 1 << 16, EVENTS = 256 };
static int peer_of[DESCRIPTORS];
static char bytes[256 * 1024];
static int poll_fd;

static struct sockaddr_in local(const char *port) {
  return (struct sockaddr_in){
      .sin_family = AF_INET, .sin_port = htons(atoi(port)), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static int new_socket(void) {
  int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
  /* Connections inherit it from their listener. */
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  return fd;
}

static void watch(int fd) {
  struct epoll_event wish = {.events = EPOLLIN | EPOLLET, .data.fd = fd};
  epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &wish);
}

static void pair(int client, const struct sockaddr_in *upstream) {
  int host = new_socket();
  if (host < 0 || host >= DESCRIPTORS || connect(host, (const void *)upstream, sizeof *upstream)) {
    close(client);
    close(host);
    return;
  }
  peer_of[client] = host;
  peer_of[host] = client;
  watch(client);
  watch(host);
}

static void finish(int fd) {
  int peer = peer_of[fd];
  peer_of[fd] = peer_of[peer] = 0;
  close(fd);
  close(peer);
}

/* Reads until there is nothing left, which a short read tells; writing waits for room. */
static void pass_on(int from) {
  for (ssize_t read = sizeof bytes; read == sizeof bytes;) {
    read = recv(from, bytes, sizeof bytes, MSG_DONTWAIT);
    if (read < 0 && errno == EAGAIN) return;
    if (read <= 0 || send(peer_of[from], bytes, read, MSG_NOSIGNAL) != read) return finish(from);
  }
}

int main(int count, char **arguments) {
  if (count != 3) return 2;
  struct sockaddr_in own = local(arguments[1]), upstream = local(arguments[2]);
  int listener = new_socket();
  if (bind(listener, (void *)&own, sizeof own) || listen(listener, 1024)) {
    perror("relay");
    return 1;
  }
  /* All that wait are taken at once; what is taken blocks again, but for reading. */
  fcntl(listener, F_SETFL, O_NONBLOCK);
  poll_fd = epoll_create1(0);
  watch(listener);
  for (struct epoll_event events[EVENTS];;) {
    int ready = epoll_wait(poll_fd, events, EVENTS, -1);
    for (int i = 0; i < ready; i++) {
      int fd = events[i].data.fd;
      if (fd != listener) {
        if (peer_of[fd]) pass_on(fd);
        continue;
      }
      for (int client; (client = accept(listener, NULL, NULL)) >= 0;) {
        if (client < DESCRIPTORS) pair(client, &upstream);
        else close(client);
      }
    }
  }
}
