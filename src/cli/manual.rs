//! Shell completions and the manual page, from the same declarations as the help.

use std::process::ExitCode;

use clap::CommandFactory;

use super::Cli;

/// Print completions for a shell.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama completions bash > ~/.local/share/bash-completion/completions/xllama")]
pub struct CompletionsArgs {
    shell: clap_complete::Shell,
}

/// Print the manual page.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama man > ~/.local/share/man/man1/xllama.1")]
pub struct ManArgs {}

impl CompletionsArgs {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        clap_complete::generate(self.shell, &mut Cli::command(), "xllama", &mut std::io::stdout());
        Ok(ExitCode::SUCCESS)
    }
}

impl ManArgs {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let command = Cli::command();
        clap_mangen::Man::new(command.clone()).render(&mut std::io::stdout())?;
        for sub in command.get_subcommands() {
            clap_mangen::Man::new(sub.clone()).render_options_section(&mut std::io::stdout())?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
