%% A process for each connection; their parent starts the next acceptor when one says that it is taken.
-module(echo).
-export([start/1]).

start([Port, Acceptors, Backlog]) ->
    Options = [binary, {active, false}, {reuseaddr, true}, {ip, {127, 0, 0, 1}}, {backlog, number(Backlog)}],
    {ok, Listener} = gen_tcp:listen(number(Port), Options),
    process_flag(trap_exit, true),
    [acceptor(Listener) || _ <- lists:seq(1, number(Acceptors))],
    parent(Listener).

number(Atom) -> list_to_integer(atom_to_list(Atom)).

parent(Listener) ->
    receive
        taken -> acceptor(Listener);
        {'EXIT', _, _} -> ok
    end,
    parent(Listener).

acceptor(Listener) ->
    Parent = self(),
    spawn_link(fun() ->
        {ok, Socket} = gen_tcp:accept(Listener),
        Parent ! taken,
        loop(Socket)
    end).

loop(Socket) ->
    case gen_tcp:recv(Socket, 0) of
        {ok, Data} ->
            case gen_tcp:send(Socket, Data) of
                ok -> loop(Socket);
                _ -> gen_tcp:close(Socket)
            end;
        _ -> gen_tcp:close(Socket)
    end.
