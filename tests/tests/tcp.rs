//! TCP: listeners, connections with one or both ends in the tree, and the network lock.

crate::survives! {
    tcp_listeners_keep_addresses_and_options: "tcp_listener";
    tcp_connections_inside_the_tree_keep_everything: "tcp_connections";
}
