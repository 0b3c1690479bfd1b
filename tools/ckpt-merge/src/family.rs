//! Which directories belong together: the `parent` links, followed as far as they lead.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use ckpt_images::chain::PARENT;
use ckpt_proto::Image;

/// Checkpoints beside those of `chain` that have one of them among their own ancestors.
///
/// # Errors
/// A directory can't be listed.
pub fn dependents(chain: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let members: BTreeSet<&Path> = chain.iter().map(PathBuf::as_path).collect();
    let all = around(chain)?;
    Ok(all.into_iter().filter(|dir| !members.contains(&**dir) && leads_into(dir, &members)).collect())
}

/// The chain, and all checkpoints beside those in it, by name.
///
/// # Errors
/// A directory can't be listed.
pub fn beside(chain: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = around(chain)?;
    // A link to one of them is no other.
    let is_dir = |dir: &PathBuf| fs::symlink_metadata(dir).is_ok_and(|meta| meta.is_dir());
    all.retain(|dir| is_dir(dir) && dir.join(Image::Inventory.file_name(0)).is_file());
    Ok(all)
}

/// Everything in the directories that the chain's directories are in, by name.
fn around(chain: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let places: BTreeSet<&Path> = chain.iter().filter_map(|dir| dir.parent()).collect();
    let mut found = Vec::new();
    for place in places {
        let what = || place.display().to_string();
        for entry in fs::read_dir(place).with_context(what)? {
            let path = entry.with_context(what)?.path();
            // Partial directories are hidden, and nobody's yet.
            let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if !hidden {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A link that is broken or goes round in a circle leads nowhere.
fn leads_into(dir: &Path, members: &BTreeSet<&Path>) -> bool {
    let mut at = dir.to_owned();
    let mut seen = BTreeSet::new();
    while let Ok(next) = at.join(PARENT).canonicalize() {
        if members.contains(&*next) {
            return true;
        }
        if !seen.insert(next.clone()) {
            return false;
        }
        at = next;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use ckpt_images::chain::ancestry;

    use super::*;

    #[test]
    fn chains_loops_and_those_that_lead_in() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let link = |name: &str, to: &str| {
            fs::create_dir_all(dir.join(name)).unwrap();
            symlink(to, dir.join(name).join(PARENT)).unwrap();
        };
        fs::create_dir(dir.join("1")).unwrap();
        link("2", "../1");
        link("3", "../2");
        link("branch", "../2");
        link("stray", "../nowhere");
        link("round", "../about");
        link("about", "../round");
        let chain = ancestry(&dir.join("3")).unwrap();
        assert_eq!(chain, [dir.join("3"), dir.join("2"), dir.join("1")]);
        assert_eq!(dependents(&chain).unwrap(), [dir.join("branch")]);
        assert!(ancestry(&dir.join("round")).is_err() && ancestry(&dir.join("stray")).is_err());
    }
}
