# echo.pl PORT WORKERS BACKLOG
package Echo;
use strict;
use warnings;
use base 'Net::Server::PreFork';

sub process_request {
    my $client = shift->{server}{client};
    while (sysread $client, my $data, 4096) {
        for (my $sent = 0; $sent < length $data;) {
            my $count = syswrite $client, $data, length($data) - $sent, $sent;
            return unless defined $count;
            $sent += $count;
        }
    }
}

my ($port, $workers, $backlog) = @ARGV;
@ARGV = ();
Echo->run(
    host => '127.0.0.1', port => $port, ipv => 4, listen => $backlog, no_client_stdout => 1, log_level => 0,
    min_servers => $workers, max_servers => 256, min_spare_servers => $workers / 2, max_spare_servers => 2 * $workers,
);
