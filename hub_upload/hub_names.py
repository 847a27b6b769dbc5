"""Identifiers that the Hub's card metadata takes: licences and languages.

huggingface_hub 2.4 and its older versions hold neither list (they send any string), so both stand here: the licences
of https://huggingface.co/docs/hub/repositories-licenses, and the codes of ISO 639-1, 639-2 and 639-3, which its
documentation of `language` names.
"""

from difflib import get_close_matches

LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split()
SPECIAL = ("code", "multilingual")  # what the Hub takes for a language beside the codes
TWO_LETTERS = """
aa Afar, ab Abkhazian, ae Avestan, af Afrikaans, ak Akan, am Amharic, an Aragonese, ar Arabic, as Assamese, av Avaric,
ay Aymara, az Azerbaijani, ba Bashkir, be Belarusian, bg Bulgarian, bi Bislama, bm Bambara, bn Bengali, bo Tibetan, br
Breton, bs Bosnian, ca Catalan, ce Chechen, ch Chamorro, co Corsican, cr Cree, cs Czech, cu Church Slavic, cv Chuvash,
cy Welsh, da Danish, de German, dv Divehi, dz Dzongkha, ee Ewe, el Greek, en English, eo Esperanto, es Spanish, et
Estonian, eu Basque, fa Persian, ff Fulah, fi Finnish, fj Fijian, fo Faroese, fr French, fy Western Frisian, ga Irish,
gd Scottish Gaelic, gl Galician, gn Guarani, gu Gujarati, gv Manx, ha Hausa, he Hebrew, hi Hindi, ho Hiri Motu, hr
Croatian, ht Haitian, hu Hungarian, hy Armenian, hz Herero, ia Interlingua, id Indonesian, ie Interlingue, ig Igbo, ii
Sichuan Yi, ik Inupiaq, io Ido, is Icelandic, it Italian, iu Inuktitut, ja Japanese, jv Javanese, ka Georgian, kg
Kongo, ki Kikuyu, kj Kuanyama, kk Kazakh, kl Kalaallisut, km Khmer, kn Kannada, ko Korean, kr Kanuri, ks Kashmiri, ku
Kurdish, kv Komi, kw Cornish, ky Kirghiz, la Latin, lb Luxembourgish, lg Ganda, li Limburgan, ln Lingala, lo Lao, lt
Lithuanian, lu Luba-Katanga, lv Latvian, mg Malagasy, mh Marshallese, mi Maori, mk Macedonian, ml Malayalam, mn
Mongolian, mr Marathi, ms Malay, mt Maltese, my Burmese, na Nauru, nb Norwegian Bokmål, nd North Ndebele, ne Nepali, ng
Ndonga, nl Dutch, nn Norwegian Nynorsk, no Norwegian, nr South Ndebele, nv Navajo, ny Chichewa, oc Occitan, oj Ojibwa,
om Oromo, or Oriya, os Ossetian, pa Panjabi, pi Pali, pl Polish, ps Pushto, pt Portuguese, qu Quechua, rm Romansh, rn
Rundi, ro Romanian, ru Russian, rw Kinyarwanda, sa Sanskrit, sc Sardinian, sd Sindhi, se Northern Sami, sg Sango, sh
Serbo-Croatian, si Sinhala, sk Slovak, sl Slovenian, sm Samoan, sn Shona, so Somali, sq Albanian, sr Serbian, ss Swati,
st Southern Sotho, su Sundanese, sv Swedish, sw Swahili, ta Tamil, te Telugu, tg Tajik, th Thai, ti Tigrinya, tk
Turkmen, tl Tagalog, tn Tswana, to Tonga, tr Turkish, ts Tsonga, tt Tatar, tw Twi, ty Tahitian, ug Uighur, uk
Ukrainian, ur Urdu, uz Uzbek, ve Venda, vi Vietnamese, vo Volapük, wa Walloon, wo Wolof, xh Xhosa, yi Yiddish, yo
Yoruba, za Zhuang, zh Chinese, zu Zulu
"""
# The first two letters, and every third that makes a code of them.
THREE_LETTERS = """
aa:abcdefghiklnopqrstuwxz ab:abcdefghijklmnopqrstuvwxyz ac:abdefhiklmnpqrstuvwxyz ad:abdefghijlnoqrstuwxyz
ae:abcdeklmnqrsuwyz af:bdeghiknoprstuz ag:abcdefghijklmnoqrstuvwxyz ah:abghiklmnoprst ai:abcdefghijklmnopqrtwxy
aj:aginsuwz ak:abcdefghijklmopqrstuvwxyz al:abcdefhijklmnopqrstuwxyz am:abcefghijklmnopqrstuvwxyz
an:abcdefghijklmnopqrstuvwxyz ao:abcdefgijklmnrstuxz ap:bcdefghijklmnopqrstuvwxyz aq:cdgkmnprtz
ar:abcdeghijklmnopqrsuvwxyz as:abcefghijklmnopqrstuvwxyz at:abcdegijklmnopqrstuvwxyz au:abcdghijklmnopqrtuwxyz
av:abdeiklmnostuv aw:abceghikmnorstuvwxy ax:begklmx ay:abcdeghiklmnopqrstuz az:abdegjmnotz ba:abcefghjklmnopqrsuvwxy
bb:abcdefghijklmnopqrstuvwxy bc:abcdefghijklmnopqrstuvwyz bd:abcdefghijklmnopqrstuvwxyz be:abcdefghijklmnopqstuvwxyz
bf:abcdefghijklmnopqrstuwxyz bg:abcdefgijklnopqrstuvwxyz bh:abcdefghijlmnopqrstuvwxyz bi:abdefgklmnopqrstuvwxyz
bj:abcefghijklmnoprstuvwxyz bk:acdfghijklmnopqrstuvwxyz bl:abcdefhijklmnopqrstvwxyz bm:abcdefghijklmnopqrstuvwxz
bn:abcdefgijklmnopqrsuvwxyz bo:abdefghijklmnopqrstuvwxyz bp:acdeghijklmnopqrstuvwxyz bq:abcdfghijklmnopqrstuvwxyz
br:abcdefghijklmnopqrstuvwxyz bs:abcefghijklmnopqrstuvwxy bt:acdefghijmnopqrstuvwxyz bu:abcdefghijklmnopqrstuvwxyz
bv:abcdefghijklmnopqrtuvwxyz bw:abcdefghijklmnopqrstuwxyz bx:abcdefghijklmnopqrsuvwz by:abcdefghijklmnopqrstvwxz
bz:abcdefghijklmnopqrstuvwxyz ca:abcdefghjklmnopqrstvwxyz cb:bcdgijklnoqrstuvwy cc:cdeghjlmopr cd:aefhijmnorsyz
ce:abgknsty cf:adgm cg:acgk ch:abcdefghijklmnopqrtuvwxyz ci:abcdehkmnprwy cj:aehikmnopsvy ck:bhlmnoqrstuvxyz
cl:acdehijklmostuwy cm:aegilmnorst cn:abcghiklopqrstuwx co:abcdefghjklmnopqrstuvwxz cp:abcginosuxy cq:d
cr:abcdefghijklmnoqrstvwxyz cs:abcdefghijklmnopqrstvwxyz ct:acdeghlmnopstuyz cu:abchijklopqrtuvwxy cv:gn cw:abdegt cx:h
cy:abmo cz:ehknot da:acdeghijklmnoqrsuvwxz db:abdefgijlmnopqrtuvwy dc:cr dd:adegijnorsw de:cdefghilmnpqrsuvz
dg:abcdeghiklnorstwxz dh:dgilmnorsuvwx di:abcdfghijklmnopqrsuvwxyz dj:abcdefijkmnoruw dk:agkrsx dl:gkmn
dm:abcdefgklmorsuvwxy dn:adegijknortuvwy do:abcefhiklnopqrstvwxyz dp:p dr:bcdegilnoqstuy ds:behiklnoqz
dt:abdhikmnoprstuy du:abcefghiklmnopqrstuvwxyz dv:a dw:akrsuwyz dy:abdgimnoruy dz:adeglno ea:a eb:cgkoru ec:rsy ee:e
ef:aei eg:almoy eh:su ei:ptv ej:a ek:aegiklmopry el:ehiklmoux em:abegikmnpqsuwxyz en:abcdfghlmnoqruvwx eo:t ep:io
er:aghikorstw es:eghiklmnoqstuy et:bchnorstuxz eu:ds ev:ehn ew:eo ex:t ey:ao ez:ae fa:abdfghijklmnoprstuxyz fb:l fc:s
fe:r ff:im fg:r fi:aefjlnprtw fk:kv fl:ahilnry fm:pu fn:bgi fo:dimnrs fp:e fq:s fr:acdekmopqrsty fs:els
fu:bcdefhijlmnqrtuvy fv:r fw:ae ga:abcdefghijklmnopqrstuwxyz gb:abdefghijklmnopqrsuvwxyz gc:cdeflnrt
gd:abcdefghijklmnoqrstux ge:abcdfghijkloqrsvwxyz gf:kt gg:abdegkltuw gh:acehklnorst gi:abcdeghilmnpqrstuwxyz gj:kmnru
gk:adenopu gl:abcdeghjkloruvwy gm:abdghlmnruvxyz gn:abcdeghijklmnoqrtuwz go:abcdefghijklmnopqrstuvwxyz gp:aen gq:ainru
gr:abcdeghijmnoqrstuvwxyz gs:eglmnopsw gt:au gu:abcdefghijklmnopqrstuwxz gv:acefjlmnoprsy gw:abcdefgijmnrtuwx gx:x
gy:abdefgilmnoryz gz:ain ha:abcdefghijklmnopqrstuvwxyz hb:abnosu hc:ah hd:nsy he:abdghimr hg:mw hh:iry
hi:abdfghijklnortwx hj:i hk:aehkns hl:abdetu hm:abcdefghijklmnopqrstuvwyz hn:adeghijmnosu ho:abcdehijlmoprstvwyz hp:os
hr:acekmoptuvwxz hs:bhlns ht:iosux hu:bcdefghijklmnopqrstuvwxyz hv:ceknv hw:aco hy:aew ia:inr ib:abdeghlmnoruy ic:aehlr
id:abcdeiorstu if:abefkmuy ig:beglmnosw ih:bipw ii:in ij:cejns ik:ehikloprstuvwxz il:abegikmopsuv im:ailnorsty
in:abdghjlmnopstz io:ruw ip:iko iq:uw ir:ehiknruxy is:acdeghiklmnortuv it:abdeiklmorstvwxyz iu:m iv:bv iw:kmos ix:cl
iy:aox iz:hmrz ja:abcdefhjklmnoqstuvxyz jb:eijkmnortuw jc:st jd:agt je:behiklnrtu jg:beko jh:is ji:abcdeghilmoqtuvy
jj:er jk:amoprsu jl:es jm:abcdilnrswx jn:adgijls jo:bdgrsw jp:anr jq:r jr:abrtu js:l ju:abcdhiklmnoprstuwy jv:dn jw:i
jy:aey ka:abcdefghijklmnopqstuvwxyz kb:abcdeghijklmnopqrstuvwxyz kc:abcdefghijklmnopqrstuvwxyz
kd:acdefghijklmnpqrtuwxyz ke:abcdefghijklmnopqrstuvwxyz kf:abcdefghijklmnopqrstuvwxyz kg:abefgijklnopqrstuvwxy
kh:abcdefghjklmnopqrstuvwxyz ki:abcdefghijklmnopqrstuvwxyz kj:abcdeghijklmnopqrstuvxyz kk:abcdefghijklmnopqrstuvwxyz
kl:abcdefghijklmnopqrstuvwxyz km:abcdefghijklmnopqrstuvwxyz kn:abcdefgijklmnopqrstuvwxyz ko:acdefghiklmnopqrstuvwyz
kp:abcdefghijklmnoqrstuvwxyz kq:abcdefghijklmnopqrstuvwxyz kr:abcdefhijklnprstuvwxyz ks:bcdefghijklmnopqrstuvwxyz
kt:abcdefghijklmnopqstuvwxyz ku:abcdefghijklmnopqrstuvwxyz kv:abcdefghijklmnopqrtuvwxyz kw:abcdefghijklmnoprstuvwxyz
kx:abcdfhijkmnopqrstvwxyz ky:abcdefghijklmnopqrstuvwxyz kz:abcdefgiklmnopqrsuvwxyz la:abcdefghijlmnopqrstuvwxyz
lb:bcefgijklmnoqrstuvwxyz lc:cdefhlmpqs ld:abdghijklmnopq le:abcdefhijklmnopqrstuvwxyz lf:an lg:abghiklmnoqrstuz
lh:ahilmnpstu li:abcdefghjklmnopqrstuvwxyz lj:aeilpwx lk:abcdehijlmnorstuy ll:abcdefghijklmnpqsux
lm:abcdefghijklnopqruvwxy ln:abdghijlmnsuwz lo:abcefghijklmnopqrstuvwxyz lp:aenox lq:r lr:acegiklmnortvz
ls:abcdehilmnoprstvwy lt:cghinosuz lu:abcdefghijklmnopqrstuvwyz lv:aiklsu lw:aeghlmostuw lx:m ly:agn lz:hlnz
ma:abcdefghijklmnoqrstuvwxyz mb:abcdefhijklmnopqrstuvwxyz mc:abcdefghijklmnopqrstuvwxyz md:abcdefghijklmnpqrstuvwxyz
me:abcdefhijklmnopqrstuvwyz mf:abcdefghijklmnopqrstuvwxyz mg:abcdefghijklmnopqrstuvwyz mh:abcdefgijklmnopqrstuwxyz
mi:abcdefghijklmnopqrstuwxyz mj:bcdeghijklmnopqrstuvwxyz mk:abcdefgijklmnopqrstuvwxyz ml:abcefghijklmnopqrstuvwxz
mm:abcdefghijklmnopqrtuvwxyz mn:abcdefghijklmnpqrsuvwxyz mo:acdeghijkmnopqrstuvwxyz mp:abcdeghijklmnopqrstuvwxyz
mq:abcefghijklmnopqrstuvwxyz mr:abcdefghijklmnopqrstuvwxyz ms:abcdefghijklmnopqrsuvwxyz mt:abcdefghijklmnopqrstuvwxy
mu:abcdeghijklmopqrstuvxyz mv:abdefghiklnopqrstuvwxyz mw:abcefghiklmnopqrstuvwz mx:abcdefghijklmnopqrstuvwxyz
my:abcefghjklmoprsuvwxyz mz:abcdeghijklmnopqrstuvwxyz na:abcefgjklmnopqrstuvwxyz nb:abcdeghijklmnopqrstuvwy
nc:abcdefghijklmnoqrstuxz nd:abcdefghijklmnopqrstuvwxyz ne:abcdefghijkmnopqrstuvwxyz nf:adlru
ng:abcdeghijklmnpqrstuvwxyz nh:abcdefghikmnopqrtuvwxyz ni:abdefghijklmnoqrstuvwxyz nj:abdhijlmnorstuxyz
nk:abcdefghijkmnopqrstuvwxz nl:acdegijklmoquvwxyz nm:abcdefghijklmnopqrstuvwxyz nn:abcdefghijklmnopqrtuvwyz
no:abcdefghijklnpqrstuvwyz np:abghilnosuxy nq:gklmnoqty nr:abcefgiklmnprtuxz ns:abcdefghiklmnopqrstuvwxyz
nt:dgijkmopruwxyz nu:acdefghijklmnopqrstuvwxyz nv:hmo nw:abcegimorwxy nx:adegiklmnoqrx ny:abcdefghijklmnopqrstuvwxy
nz:abdikmrsuyz oa:ackrv ob:iklmortu oc:ahimou od:aktu of:osu og:bcegou oh:tu oi:aen oj:bcgipsvw ok:abcdeghijklmnorsuvxz
ol:adekmortu om:abcgiklnoprtuwxy on:abegijknoprstuwx oo:dgnrs op:akmoty or:aceghimnorstuvwxyz os:acinopstux
ot:abdeiklmnqrstuwxyz ou:abeim ov:d ow:il oy:bdmy oz:m pa:bcdefghiklmnopqrsuvwxyz pb:bcefghilmnoprstuvy
pc:abcdefghijklmnpw pd:acinotu pe:abdefghijklmopqrsvxyz pf:ael pg:adgiklnsuz ph:adghjklmnoqrtuvw
pi:abcdefghjlmnoprstuvwxyz pj:t pk:abcghnoprstu pl:abcdeghiklnoqrstuvwyz pm:abdefhijlmnoqrstwxyz
pn:abcdeghijklmnopqrstuvwxyz po:cefghiklmnopqrstvwxy pp:eiklmnopqstu pq:am pr:cdefghiklmnoqrstuwxz
ps:acdeghilmnopqrstuwy pt:ahinopqrtuvwy pu:abcdefgijmopqrstuwxy pw:abgimnorw px:m py:emnsuxy pz:ehn
qu:abcdefghiklmnpqrsvwxyz qv:acehijlmnopswyz qw:achmst qx:achlnopqrstuw qy:ap ra:abcdfghijklmnopqrstuvwxyz rb:bklp rc:f
rd:b re:abegijlmnrsty rg:aeknrsu rh:gp ri:abflmnrtu rj:gis rk:abhimtw rm:abcdefghiklmnopqstuvwxyz rn:bdglnprw
ro:bcdefghlmnopruw rp:nt rr:imot rs:bklmnw rt:chmsw ru:bcefghikmnopqstuyz rw:aklmor rx:dw ry:nsu rz:h
sa:abcdefghjkmnoqrstuvwxyz sb:abcdefghijklmnopqrstuvwxyz sc:befghiklnopqstuvwx sd:abcefghjklnopqrstuxz
se:abcdefghijklnopqrstuvwyz sf:bemsw sg:abcdeghijkmprstuwxyz sh:abcdeghijklmnopqrstuvwxyz si:abdefghijklmnpqrsuvwxyz
sj:abcdegklmnoprstuw sk:abcdefghijmnopqrstuvwxyz sl:cdefghijklmnoprstuvwxyz sm:abcefghjklmnopqrstuvwxyz
sn:acdefgijklmnopqrsuvwxyz so:abcdeghijklmopqrstuvwxyz sp:abcdegiklmnopqrstuvxy sq:ahikmnoqrstux
sr:abcdefghiklmnopqrstuvwxyz ss:bcdefghijklmnopqrstuvwxyz st:abdefghijklmnopqrstuvwy su:abcegijknoqrstvwxyz sv:abcekmsx
sw:abcefghijklmnopqrstuvwxy sx:bcegklmnorsuw sy:abciklmnorswxy sz:abceglnpsvwy ta:abcdefghjklmnopqrstuvwxyz
tb:acdefghijklmnoprstuvwxyz tc:abcdefghiklmnopqstuwxyz td:abcdefghijklmnoqrstvxy te:abcdefghiklmnopqrstuvwxyz tf:inort
tg:abcdefhijklnopqrstuvwxyz th:adefhiklmnpqrstuvyz ti:abcfghijklmnopqrstuvwxyz tj:agijlmnopsuw tk:abdefglmnpqrstuvwxz
tl:abcdfghijklmnopqrstuvxy tm:abcdefghijlmnoqrstuvwyz tn:abcdghiklmnopqrstuvwxyz to:bcdfghijklmnopqrsuvwxyz
tp:acefgijklmnopqrtuvxyz tq:blmnopqrtuw tr:abcdefghijlmnopqrstuvwxyz ts:abcdeghijklmnopqrstuvwxyz
tt:abcdefghijklmnopqrstuvwyz tu:abcdefghijklmnoqrsuvxyz tv:adeiklmnostuwxy tw:abcdefghilmnopqrtuwxy
tx:abceghijmnoqrstuxy ty:aehijlnprstuvxyz tz:ahjlmnox ua:mnr ub:ailruy ud:aegijlmu ue:s uf:i ug:abehnoy uh:an ui:gsv
uj:i uk:aghiklpqrsuvwy ul:abcefiklmnuwy um:abcdgimnoprsu un:adegikmnruxz uo:n up:iv ur:abcdefghiklmnoprtuvwxyz
us:ahikpsu ut:aehpru uu:mru uv:ehl uw:a uy:a uz:bns va:aefghijlmnoprsuvy vb:bk ve:cdlmnopr vg:rt vi:cdefglnstv vj:k
vk:ajklmnoptuz vl:ps vm:abcdefghijklmpqrsuvwxyz vn:kmp vo:lrt vr:aost vs:ilnv vt:o vu:mnt vw:a
wa:abcdefghijlmnopqrstuvwxyz wb:abefhijklmpqrstvw wc:ai wd:dgjktuy we:acdghilmoprstuw wf:g wg:abgiouy wh:agku
wi:bcefghijklmnruvy wj:ai wk:abdlruwy wl:aceghiklmnorsuvwxy wm:abcdeghimnostwx wn:bcdegikmnopuwy wo:abcdefgiklmnorswy
wp:c wr:bghiklmnoprsuvwxyz ws:agikrsuv wt:bfhikmw wu:abdhlmnrtuvxy ww:aborw wx:aw wy:bimnry xa:abcdegijklmnopqrstuvwy
xb:bcdegijmnoprwy xc:bceghlmnortuvwy xd:ackmoqy xe:bdglmprstu xf:a xg:abdfgilmruw xh:acdemortuv xi:bilnrsvy xj:bt
xk:abcdefgijklnopqrstuvwxyz xl:abcdeginopsuy xm:abcdefghjklmnopqrstuvwxyz xn:abghijkmnoqrstuyz xo:cdgikmnoprw
xp:abcdefghijklmnopqrstuvwxyz xq:at xr:abdegimnrtuw xs:abcdehijlmnopqruvy xt:abcdeghijlmnopqrstuvwy xu:abdgjlmnoprtu
xv:einos xw:acdegjklortw xx:bkmrt xy:abjklty xz:hmp ya:abcdefghijklmnopqrstuvwxyz yb:abehijklmnoxy yc:hlnpr yd:adegk
ye:aceijlrstuvy yg:ailmprsuw yh:adls yi:adfghijklmnpqrstuvxz yk:aghiklmnortuy yl:abegilmnoruy ym:bcdeghiklmnopqrsxz
yn:abdegklnoqsu yo:bgiklmnrtxy yp:abghmnopz yr:abeklmnoswy ys:cdglmnoprsy yt:alpwy yu:abcdefgijklmnpqrtwxyz yv:at
yw:aglnqrtuw yx:aglmuy yy:ruz yz:gk za:abcdefghijklmopqrstuvwxyz zb:aceltuw zc:adh zd:j ze:aghmn zg:abhmnr zh:abdinow
zi:abklmnwz zk:adghknoprtuvz zl:ajmnqu zm:abcdefghijklmnopqrstuvwxyz zn:aegks zo:chmoqrs zp:abcdefghijklmnopqrstuvwxyz
zq:e zr:agnops zs:aklmru zt:eglmnpqstuxy zu:hlmny zw:a zx:x zy:bgjnp zz:aj
"""


def check_license(license: str | None) -> None:
    """
    Whether a licence is one of the Hub's identifiers.

    Raises:
        `ValueError`: naming the nearest of them.
    """
    if license is None or license in LICENSES:
        return
    near = _near(license, {name: name for name in LICENSES})
    raise ValueError(
        f"`license` must be one of the Hub's identifiers, or `other` for one that it has no name for, got "
        f"{license!r}{near} (https://huggingface.co/docs/hub/repositories-licenses)"
    )


def check_languages(language: str | list[str] | None) -> None:
    """
    Whether every language is an ISO 639 code of two or three letters, "code" or "multilingual".

    Raises:
        `ValueError`: naming the nearest code, or the code of the language whose English name was given.
    """
    given = [] if language is None else [language] if isinstance(language, str) else language
    named = dict(pair.split(" ", 1) for pair in " ".join(TWO_LETTERS.split()).split(", "))
    groups = (group.split(":") for group in THREE_LETTERS.split())
    codes = {*named, *SPECIAL, *(two + letter for two, letters in groups for letter in letters)}
    for code in given:
        if code in codes:
            continue
        start = str(code).replace("_", "-").split("-")[0].casefold()  # of zh-CN, pt_BR, EN
        near = f", did you mean {start!r}?" if start in codes else None
        near = near or _near(code, {name.casefold(): short for short, name in named.items()})
        raise ValueError(
            f"`language` must be ISO 639 codes of two or three letters, 'code' or 'multilingual', got {code!r}{near}"
        )


def check_repositories(**given: str | list[str] | None) -> None:
    """
    Whether names have the form of Hub repositories, so that the card's links can lead somewhere: no paths.

    Raises:
        `ValueError`: naming the argument.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for argument, names in given.items():
        for name in [names] if isinstance(names, str) else names or []:
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(f"`{argument}` must be names on the Hub, got {name!r}: {error}") from error


def _near(value: str, known: dict[str, str]) -> str:
    found = get_close_matches(str(value).casefold(), known, 1, 0.75)
    return f", did you mean {known[found[0]]!r}?" if found else ""
