# Writes the tar OUT of the members in the text file IN with Perl's Archive::Tar: write.pl FORMAT IN OUT.
# A line of IN is a member: kind, name, link, owner, seconds and text, separated by tabs.
use strict;
use warnings;
use Archive::Tar;
use Archive::Tar::Constant;

my ($format, $in, $out) = @ARGV;
my %kinds = (file => FILE, folder => DIR, symlink => SYMLINK, hardlink => HARDLINK);
my $tar = Archive::Tar->new;
open(my $lines, '<', $in) or die $!;
while (my $line = <$lines>) {
    chomp $line;
    my ($kind, $name, $link, $owner, $seconds, $text) = split /\t/, $line, -1;
    $tar->add_data($name, $text, { type => $kinds{$kind}, linkname => $link, uid => $owner, mtime => int $seconds });
}
$tar->write($out) or die $tar->error;
