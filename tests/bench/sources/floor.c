/* The least that a preforking server can cost: processes that block in accept(), and nobody who looks after them. */
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void echo(int fd)
{
    char data[4096];
    ssize_t count;
    while ((count = recv(fd, data, sizeof data, 0)) > 0)
        for (ssize_t sent = 0, more; sent < count; sent += more)
            if ((more = send(fd, data + sent, count - sent, MSG_NOSIGNAL)) <= 0)
                return;
}

int main(int count, char **words)
{
    int port = atoi(words[1]), workers = atoi(words[2]), backlog = atoi(words[3]), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    (void)count;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, backlog))
        return 1;
    for (int i = 0; i < workers; i++)
        if (fork() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (int fd; (fd = accept(listener, NULL, NULL)) >= 0; close(fd))
                echo(fd);
            _exit(1);
        }
    pause();
    return 0;
}
