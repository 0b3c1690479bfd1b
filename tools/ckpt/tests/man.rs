//! Manual pages and --help tell the same story.
#![allow(missing_docs)]

use std::path::Path;

#[test]
fn every_option_is_in_its_page_and_every_page_option_exists() {
    for command in [
        ckpt::command(),
        ckpt_check::command(),
        ckpt_encode::command(),
        ckpt_mem::command(),
        ckpt_read::command(),
        ckpt_restore::command(),
        ckpt_scan::command(),
        ckpt_show::command(),
        ckpt_series::command(),
        ckpt_sk::command(),
        ckpt_track::command(),
        ckpt_write::command(),
        sk_rewrite::command(),
    ] {
        let name = command.get_name().to_owned();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../man").join(format!("{name}.1"));
        let page = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let items: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix(".It ")).collect();
        let mut known = vec!["help".to_owned(), "version".to_owned()];
        for command in std::iter::once(&command).chain(command.get_subcommands()) {
            for arg in command.get_arguments().filter(|arg| !arg.is_positional()) {
                let item = match (arg.get_long(), arg.get_short()) {
                    (Some(long), _) => format!("Fl -{long}"),
                    (None, Some(short)) => format!("Fl {short}"),
                    (None, None) => continue,
                };
                let has = |line: &&str| line.ends_with(&item) || line.contains(&format!("{item} "));
                assert!(items.iter().any(has), "{name}.1 lacks {item}");
                known.extend(arg.get_long().map(str::to_owned));
            }
        }
        for long in items.iter().filter_map(|line| line.split("Fl -").nth(1)) {
            let long = long.split(' ').next().unwrap_or_default();
            assert!(known.iter().any(|known| known == long), "{name} has no --{long}");
        }
        let help = command.clone().render_help().to_string();
        assert!(help.lines().count() <= 40, "{name} --help does not fit a screen");
    }
}
