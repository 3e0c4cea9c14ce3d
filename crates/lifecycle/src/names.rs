//! Where names of hosts are looked up.

// The C library has no safe interface for this.
#![allow(unsafe_code)]

/// From now on host names are looked up in the hosts file, then by DNS, whatever `/etc/nsswitch.conf` says: its other sources are
/// libraries of the system, made for the system's C library, which need not be the one in this program. Istio's programs know
/// no other sources, either. To be called before the first name is looked up.
pub fn use_files_and_dns() {
    #[cfg(target_env = "gnu")]
    {
        use std::ffi::{c_char, c_int};
        unsafe extern "C" {
            fn __nss_configure_lookup(database: *const c_char, sources: *const c_char) -> c_int;
        }
        // SAFETY: glibc's function (nss/nss_database.c) takes two texts that end in NUL, and keeps neither. Should it fail, the
        // system's configuration holds.
        unsafe {
            __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::ToSocketAddrs;

    #[test]
    fn names_are_found_in_the_hosts_file() {
        super::use_files_and_dns();
        let found = ("localhost", 80).to_socket_addrs().unwrap().next().unwrap();
        assert!(found.ip().is_loopback());
    }
}
